// The clock that all of the page follows, and what moves it: buttons, keys, the pointer.

const STEPS_A_SECOND = 12; // of an answer without a clock
const LONG_ENOUGH = 3; // seconds that a replay takes, if the speeds are slow enough for that

class Player {
  constructor(recordings) {
    this.recordings = recordings;
    this.timed = recordings[0].timed;
    this.duration = Math.max(...recordings.map((one) => one.duration));
    this.stops = [...new Set([0, ...recordings.flatMap((one) => one.times)])].sort((one, other) => one - other);
    this.time = 0;
    this.playing = false;
    this.views = recordings.map((one) => new AnswerView(one, (time) => this.tell(time)));
    for (const name of ["play", "seek", "clock", "speed", "plots", "answers", "tip", "axis"]) {
      this[name === "play" ? "button" : name] = document.getElementById(name);
    }
    this.answers.append(...this.views.map((view) => view.root));
    this.answers.classList.toggle("only", this.views.length === 1);
    Object.assign(this, drawPlots(recordings, this.duration, this.timed));
    this.axis.append(...[0, 0.25, 0.5, 0.75, 1].map((part) => element("span", "", this.tell(part * this.duration))));
    this.seek.max = this.duration;
    if (this.timed) this.speed.value = ["1", "0.5", "0.25"].find((one) => this.duration / one >= LONG_ENOUGH) ?? "0.1";
    this.listen();
    this.moveTo(0);
  }

  tell(time) { return this.timed ? `${time.toFixed(2)} s` : `${Math.round(time)} steps`; }

  moveTo(time) {
    this.time = Math.min(Math.max(time, 0), this.duration);
    document.documentElement.style.setProperty("--at", this.time / this.duration);
    this.seek.value = this.time;
    this.clock.textContent = `${this.tell(this.time)} of ${this.tell(this.duration)}`;
    this.seek.setAttribute("aria-valuetext", this.clock.textContent);
    for (const part of [...this.views, ...this.charts]) part.seek(this.time);
  }

  play() {
    if (this.time >= this.duration) this.moveTo(0);
    this.playing = true;
    this.last = null;
    this.showButton();
    requestAnimationFrame((now) => this.tick(now));
  }

  pause() {
    this.playing = false;
    this.showButton();
  }

  toggle() { if (this.playing) this.pause(); else this.play(); }

  showButton() {
    this.button.textContent = this.playing ? "❚❚" : "▶";
    this.button.setAttribute("aria-label", this.playing ? "Pause" : "Play");
  }

  tick(now) {
    if (!this.playing) return;
    const passed = Math.min((now - (this.last ?? now)) / 1000, 0.25); // a tab that slept goes on where it was
    this.last = now;
    this.moveTo(this.time + passed * this.speed.value * (this.timed ? 1 : STEPS_A_SECOND));
    if (this.time >= this.duration) this.pause();
    else requestAnimationFrame((later) => this.tick(later));
  }

  /** Move by so many steps, of whichever answer. */
  stepBy(count) {
    this.pause();
    const here = this.stops.findLastIndex((stop) => stop <= this.time);
    const between = count < 0 && this.stops[here] < this.time ? 1 : 0; // back to the beginning of this step first
    this.moveTo(this.stops[Math.min(Math.max(here + count + between, 0), this.stops.length - 1)]);
  }

  listen() {
    this.button.addEventListener("click", () => this.toggle());
    this.button.addEventListener("keyup", (event) => { if (event.key === " ") event.preventDefault(); });
    this.seek.addEventListener("input", () => { this.pause(); this.moveTo(Number(this.seek.value)); });
    document.addEventListener("keydown", (event) => this.pressed(event));
    this.plots.addEventListener("pointerdown", (event) => { this.plots.setPointerCapture(event.pointerId); this.pointed(event); });
    this.plots.addEventListener("pointermove", (event) => { if (event.buttons & 1) this.pointed(event); });
    this.plots.addEventListener("pointerover", (event) => this.pointedAtRow(event.target));
    this.plots.addEventListener("pointerleave", () => this.focus(null));
    this.answers.addEventListener("pointerover", (event) => this.pointedAtToken(event));
    this.answers.addEventListener("pointerleave", () => this.focus(null));
    addEventListener("beforeprint", () => { this.before = this.time; this.pause(); this.moveTo(this.duration); });
    addEventListener("afterprint", () => this.moveTo(this.before));
  }

  pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target === this.speed) return;
    const many = event.shiftKey ? 10 : 1;
    const does = {
      " ": () => this.toggle(),
      ArrowLeft: () => this.stepBy(-many),
      ArrowRight: () => this.stepBy(many),
      Home: () => { this.pause(); this.moveTo(0); },
      End: () => { this.pause(); this.moveTo(this.duration); },
    }[event.key];
    if (!does) return;
    event.preventDefault();
    does();
  }

  pointed(event) {
    const {left, width} = document.querySelector(".chart svg").getBoundingClientRect();
    if (event.clientX < left - 8) return;
    this.pause();
    this.moveTo(((event.clientX - left) / width) * this.duration);
  }

  pointedAtRow(target) {
    const found = this.rows.find(({row}) => row.contains(target));
    this.focus(found && found.recording.kind !== "plain" ? found.index : null);
  }

  pointedAtToken(event) {
    const [view, found] = this.views.map((one) => [one, one.explain(event.target)]).find((pair) => pair[1]) ?? [];
    this.focus(view && view.recording.kind !== "plain" ? found.thread : null);
    this.tip.hidden = !found;
    if (!found) return;
    this.tip.textContent = found.text;
    const {width, height} = this.tip.getBoundingClientRect();
    const box = event.target.getBoundingClientRect();
    const above = box.top - height - 6;
    this.tip.style.left = `${Math.max(8, Math.min(event.clientX - width / 2, innerWidth - width - 8))}px`;
    this.tip.style.top = `${above > 4 ? above : box.bottom + 6}px`;
  }

  focus(thread) {
    this.tip.hidden = true;
    for (const view of this.views) view.focus(view.recording.kind === "plain" ? null : thread);
    for (const {recording, index, row} of this.rows) {
      row.classList.toggle("focus", recording.kind !== "plain" && index === thread);
    }
  }
}

document.querySelector("main").hidden = document.getElementById("controls").hidden = false;
const data = JSON.parse(document.getElementById("data").textContent);
const player = new Player(data.map((values) => new Recording(values)));
if (!matchMedia("(prefers-reduced-motion: reduce)").matches) player.play();
