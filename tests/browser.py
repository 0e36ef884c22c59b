"""A page in a real headless Chromium, over its debugging pipe: no driver, no port, no package."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from contextlib import contextmanager

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
)  # fmt: skip
KEYS = {" ": 32, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39, "Tab": 9}
SHIFT = 8


def executable():
    """Return a browser of this machine, None if there is none; CHROME names one."""
    return os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def open_browser(folder):
    """Start a browser whose profile lies in ``folder``; end it afterwards."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    start = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'  # the browser reads its commands from 3 and answers on 4
    command = ["bash", "-c", start, "bash", executable(), *FLAGS, f"--user-data-dir={folder}"]
    process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL)
    os.close(theirs_in), os.close(theirs_out)
    browser = Browser(ours_in, ours_out)
    try:
        yield browser
    finally:
        browser.command("Browser.close")
        process.wait(20)
        os.close(ours_in), os.close(ours_out)


class Browser:
    """Sends commands of the DevTools protocol and keeps the events that come in between."""

    def __init__(self, incoming, outgoing):
        self.incoming, self.outgoing, self.count, self.buffer, self.events = incoming, outgoing, 0, b"", []

    def command(self, method, session=None, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self.outgoing, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']['message']}"
        return answer["result"]

    def receive(self, seconds=30):
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.incoming], [], [], seconds)
            assert ready, f"the browser said nothing for {seconds} s"
            chunk = os.read(self.incoming, 1 << 20)
            assert chunk, "the browser has ended"
            self.buffer += chunk
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    @contextmanager
    def page(self, path, *, width=1280, height=800, scheme="light", motion="reduce"):
        """Open the file ``path`` in a tab of its own; with ``motion`` "reduce" a replay does not start by itself."""
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        page = Page(self, self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.command(f"{domain}.enable")
        page.size(width, height)
        page.media(scheme=scheme, motion=motion)
        page.command("Page.navigate", url=path.resolve().as_uri())
        page.until("document.readyState === 'complete' && typeof player === 'object'")
        try:
            yield page
        finally:
            self.command("Target.closeTarget", targetId=target)


class Page:
    """One tab: what a user does with it, and what it complains of."""

    def __init__(self, browser, session):
        self.browser, self.session, self.first = browser, session, len(browser.events)

    def command(self, method, **parameters):
        return self.browser.command(method, self.session, **parameters)

    def events(self, *methods):
        self.command("Runtime.evaluate", expression="1")  # what happened until now has come when its answer has
        return [one["params"] for one in self.browser.events[self.first :] if one.get("method") in methods]

    def complaints(self):
        return self.events("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")

    def requests(self):
        return [one["request"]["url"] for one in self.events("Network.requestWillBeSent")]

    def size(self, width, height):
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def media(self, *, kind="", scheme="light", motion="reduce"):
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": motion},
        ]
        self.command("Emulation.setEmulatedMedia", media=kind, features=features)

    def evaluate(self, expression):
        answer = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression, seconds=30):
        end = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"never became true: {expression}"
            time.sleep(0.02)

    def text(self, selector):
        """Return the text that is seen of an element."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def box(self, selector):
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")

    def press(self, key, modifiers=0):
        given = {"key": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers}
        self.command("Input.dispatchKeyEvent", type="keyDown", **given, **({"text": key} if key == " " else {}))
        self.command("Input.dispatchKeyEvent", type="keyUp", **given)

    def point(self, x, y, *, click=False):
        self.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def screenshot(self, path, *, whole=False):
        answer = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def pdf(self, path):
        path.write_bytes(base64.b64decode(self.command("Page.printToPDF", printBackground=False)["data"]))
