// The text of one answer. Every token lies at its place from the beginning, so that nothing moves while threads write.

function element(tag, classes = "", text = "") {
  const made = document.createElement(tag);
  made.className = classes;
  made.textContent = text; // never markup: what a model wrote stays text
  return made;
}

const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

class AnswerView {
  constructor(recording, tells) {
    this.recording = recording;
    this.tells = tells; // what a page says of a time: seconds or steps
    this.root = element("article", `answer ${recording.kind}`);
    this.time = element("span", "time");
    this.figures = element("span", "figures");
    const head = element("header");
    head.append(element("h2", "", recording.name), this.time, this.figures);
    const text = element("div", "text");
    text.lang = "";
    text.dir = "auto";
    this.tokens = []; // {span, token, segment} in the order of writing
    this.segments = recording.segments.map((segment) => this.addSegment(text, segment));
    this.tokens.sort((one, other) => one.token.step - other.token.step);
    this.root.append(head, text);
    this.shown = 0; // how many of the tokens are seen
    this.step = null;
    if (this.tokens.some(({token}) => token.guessed)) {
      this.root.append(element("p", "legend", "Dotted: guessed by a draft and accepted."));
    }
  }

  addSegment(text, segment) {
    const {kind} = this.recording;
    const span = element("span", `segment ${kind === "plain" ? "plain" : `c${segment.thread % 8}`}`);
    const cursor = element("i", "cursor");
    span.append(cursor);
    for (const token of segment.tokens) {
      const one = element("span", `token unwritten${token.guessed ? " guessed" : ""}`, token.text);
      this.tokens.push({span: one, token, segment});
      span.append(one);
    }
    text.append(span);
    return {segment, span, cursor};
  }

  /** Show the answer as it stood at a time. */
  seek(time) {
    const {recording} = this;
    this.time.textContent = this.tells(Math.min(time, recording.duration));
    const step = recording.stepAt(time);
    if (step === this.step) return;
    this.step = step;
    while (this.shown < this.tokens.length && this.tokens[this.shown].token.step <= step) {
      this.tokens[this.shown++].span.classList.remove("unwritten");
    }
    while (this.shown > 0 && this.tokens[this.shown - 1].token.step > step) {
      this.tokens[--this.shown].span.classList.add("unwritten");
    }
    const over = step === recording.times.length - 1;
    this.markFresh(over ? null : step);
    this.segments.forEach((one) => this.markSegment(one, step, over));
    this.root.classList.toggle("done", over);
    this.figures.textContent = this.describe(step, time);
  }

  markFresh(step) {
    for (const span of this.fresh ?? []) span.classList.remove("fresh");
    this.fresh = [];
    for (let place = this.shown - 1; place >= 0 && this.tokens[place].token.step === step; place--) {
      this.fresh.push(this.tokens[place].span);
    }
    for (const span of this.fresh) span.classList.add("fresh");
  }

  markSegment({segment, span, cursor}, step, over) {
    const {recording} = this;
    const lives = !over && recording.stateOf(recording.threads[segment.thread], step) === "lives";
    span.classList.toggle("live", lives);
    span.classList.toggle("dropped", segment.cut && recording.cut <= step);
    const grows = segment.from !== null && segment.from <= step && (segment.until === null || step < segment.until);
    cursor.classList.toggle("on", lives && grows);
    if (lives && grows) this.putAtEnd(cursor, span);
  }

  /** Put a segment's cursor behind what is seen of it. */
  putAtEnd(cursor, span) {
    const written = [...span.children].filter((one) => one !== cursor && !one.classList.contains("unwritten"));
    if (written.length) written.at(-1).after(cursor); else span.prepend(cursor);
  }

  describe(step, time) {
    const {recording} = this;
    const tokens = recording.written[step] ?? 0;
    const spent = Math.min(time, recording.duration);
    const parts = [plural(tokens, "token")];
    if (spent > 0) parts.push(`${(tokens / spent).toFixed(1)} ${recording.timed ? "a second" : "a step"}`);
    if (recording.kind !== "plain" && step === recording.times.length - 1) {
      parts.push(plural(recording.threads.length, "thread"));
    } else if (recording.kind !== "plain") {
      const waiting = recording.count("waits", step);
      parts.push(`${plural(recording.count("lives", step), "thread")} at work${waiting ? `, ${waiting} waiting` : ""}`);
    }
    return parts.join(" · ");
  }

  /** Mark all that one thread wrote, or nothing. */
  focus(thread) {
    for (const {segment, span} of this.segments) span.classList.toggle("focus", segment.thread === thread);
  }

  /** Return what there is to say of the token that a span shows. */
  explain(span) {
    const found = this.tokens.find((one) => one.span === span);
    if (!found) return null;
    const {token, segment} = found;
    const lines = [`position ${token.place}, step ${token.step + 1}`];
    if (this.recording.kind !== "plain") lines.unshift(`thread ${segment.thread}`);
    if (this.recording.timed) lines.push(`after ${this.tells(this.recording.timeOf(token.step))}`);
    if (token.logprob !== null) {
      lines.push(`log probability ${token.logprob.toFixed(3)} (${(100 * Math.exp(token.logprob)).toFixed(1)} %)`);
    }
    if (token.guessed) lines.push("an accepted draft");
    return {thread: segment.thread, text: lines.join("\n")};
  }
}
