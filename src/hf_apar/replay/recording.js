// One recorded answer: what had been written at a time, how fast, and which threads were at work.

class Recording {
  constructor(values) {
    Object.assign(this, values);
    this.duration = this.times.at(-1);
    this.written = this.times.map(() => 0); // tokens of the answer up to each step
    for (const segment of this.segments) {
      if (!segment.cut) for (const token of segment.tokens) this.written[token.step] += 1;
    }
    this.written.forEach((count, step) => { this.written[step] = count + (this.written[step - 1] ?? 0); });
  }

  /** Return the last step that was over at a time. */
  stepAt(time) {
    let low = 0, high = this.times.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.times[middle] <= time) low = middle + 1; else high = middle;
    }
    return low - 1;
  }

  timeOf(step) { return step < 0 ? 0 : this.times[step]; }

  /** Return how many tokens were written by a time, as if those of a step were written all through it. */
  smoothAt(time) {
    const step = this.stepAt(time), before = this.written[step] ?? 0;
    if (step + 1 >= this.times.length) return before;
    const start = this.timeOf(step), share = (time - start) / (this.times[step + 1] - start || 1);
    return before + share * (this.written[step + 1] - before);
  }

  slotsAt(time) { return this.held[this.stepAt(time)] ?? this.prompt; }

  /** Return the tokens a second (or a step) over a window that ends at a time. */
  rateAt(time, window) {
    const span = Math.min(window, time);
    return span > 0 ? (this.smoothAt(time) - this.smoothAt(time - span)) / span : 0;
  }

  /** Return what a thread does after a step: "none" before it was born, "waits", "lives", "ended". */
  stateOf(thread, step) {
    if (thread.ended !== null && thread.ended <= step) return "ended";
    if (thread.started !== null && thread.started <= step) return "lives";
    return thread.born <= step ? "waits" : "none";
  }

  count(state, step) { return this.threads.filter((thread) => this.stateOf(thread, step) === state).length; }
}
