// What happened when: a bar for each thread, the cache slots, the speed; time runs from left to right in all of them.

const SVG = "http://www.w3.org/2000/svg";
const POINTS = 240; // of a chart's line
const WINDOW = 1 / 16; // of the whole time: what a speed is an average over

function bar(classes, from, until, duration) {
  const made = element("div", `bar ${classes}`);
  made.style.left = `${(100 * from) / duration}%`;
  made.style.width = `${(100 * Math.max(until - from, 0)) / duration}%`;
  return made;
}

/** Return a row with a bar: dashed while the thread waits, whole while it lives. */
function threadRow(recording, thread, index, duration) {
  const plain = recording.kind === "plain";
  const row = element("div", `row thread ${plain ? "plain" : `c${index % 8}`}`);
  const track = element("div", "track");
  const end = recording.timeOf(thread.ended ?? recording.times.length - 1);
  const born = recording.timeOf(thread.born), started = recording.timeOf(thread.started ?? Infinity) ?? end;
  if (started > born) track.append(bar("waits", born, started, duration));
  if (thread.started !== null) track.append(bar("lives", started, end, duration));
  row.append(element("span", "", plain ? "plain" : `thread ${index}`), track);
  return row;
}

/** Return the points of a curve from left to right, as a path over a field of 1000 by 100. */
function curve(values, most) {
  const y = (value) => (100 - (100 * value) / (most || 1)).toFixed(1);
  return values.map((value, index) => `${index ? "L" : "M"}${((1000 * index) / (values.length - 1)).toFixed(1)} ${y(value)}`).join("");
}

class Chart {
  /** `read(recording, time)` gives the value to draw. */
  constructor(name, recordings, duration, read) {
    Object.assign(this, {recordings, duration, read});
    this.root = element("div", "row chart");
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", "0 0 1000 100");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("role", "img");
    const times = Array.from({length: POINTS + 1}, (_, index) => (index * duration) / POINTS);
    const lines = recordings.map((one) => times.map((time) => (time > one.duration ? 0 : read(one, time))));
    this.peaks = lines.map((line) => Math.max(...line));
    const most = Math.max(...this.peaks);
    svg.setAttribute("aria-label", `${name}, at most ${Math.round(most)}`);
    recordings.forEach((one, index) => {
      if (one.kind !== "plain") this.draw(svg, "area", `${curve(lines[index], most)}L1000 100L0 100Z`);
      this.draw(svg, one.kind, curve(lines[index], most));
    });
    const label = element("div");
    this.values = recordings.map((one) => element(one.kind === "plain" ? "small" : "b"));
    label.append(element("span", "", name), ...this.values.toReversed());
    this.root.append(label, svg);
  }

  draw(svg, classes, points) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("class", classes);
    path.setAttribute("d", points);
    svg.append(path);
  }

  seek(time) {
    this.recordings.forEach((one, index) => {
      const over = time >= one.duration;
      const value = (over ? "at most " : "") + Math.round(over ? this.peaks[index] : this.read(one, time));
      this.values[index].textContent = one.kind === "plain" ? `plain ${value}` : value;
    });
  }
}

/** Fill the timeline and the charts; return the charts, and the row of each thread. */
function drawPlots(recordings, duration, timed) {
  const timeline = document.getElementById("timeline");
  const count = recordings.reduce((sum, one) => sum + one.threads.length, 0);
  timeline.style.setProperty("--height", `${Math.max(Math.min(16 / count, 1.05), 0.3)}rem`);
  const rows = recordings.flatMap((recording) => recording.threads.map((thread, index) => {
    const row = threadRow(recording, thread, index, duration);
    if (16 / count < 0.7) row.firstChild.textContent = "";
    timeline.append(row);
    return {recording, index, row};
  }));
  const speed = timed ? "Tokens a second" : "Tokens a step";
  const charts = [
    new Chart("KV slots held", recordings, duration, (one, time) => one.slotsAt(time)),
    new Chart(speed, recordings, duration, (one, time) => one.rateAt(time, duration * WINDOW)),
  ];
  document.getElementById("charts").append(...charts.map((chart) => chart.root));
  return {charts, rows};
}
