// Two charts over rounds, drawn anew at every change: lines of accuracy, bars of bytes.

import { el, number, percent, size, svg } from "./elements.js";

const EDGE = { top: 12, right: 14, bottom: 26, left: 46 };
const COLOURS = 8;

function frame(box, label) {
  const width = Math.max(240, box.clientWidth);
  const height = Math.max(160, box.clientHeight);
  const root = svg("svg", { role: "img", "aria-label": label, viewBox: `0 0 ${width} ${height}`, tabindex: "0" });
  return {
    root,
    width,
    height,
    left: EDGE.left,
    right: width - EDGE.right,
    top: EDGE.top,
    bottom: height - EDGE.bottom,
  };
}

function roundSteps(first, last, width) {
  const room = Math.max(2, Math.floor(width / 56));
  const steps = [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000];
  const step = steps.find((s) => (last - first) / s <= room) ?? last - first;
  const marks = [first];
  for (let at = Math.ceil((first + step / 2) / step) * step; at <= last; at += step) marks.push(at);
  return marks;
}

function axes(f, x, rounds, y, levels, words) {
  for (const level of levels) {
    f.root.append(
      svg("line", { class: "grid", x1: f.left, x2: f.right, y1: y(level), y2: y(level) }),
      svg("text", { x: f.left - 8, y: y(level) + 4, "text-anchor": "end" }, words(level)),
    );
  }
  for (const mark of rounds) {
    f.root.append(svg("text", { x: x(mark), y: f.bottom + 18, "text-anchor": "middle" }, number(mark)));
  }
}

// The series of a chart: [{id, points: [[round, share], …]}] of boards, and pooled: [[round, share], …].
export class AccuracyChart {
  constructor(box, tip, say) {
    Object.assign(this, { box, tip, say, lit: null, at: null, series: [], pooled: [] });
    new ResizeObserver(() => this.draw()).observe(box);
  }

  update(series, pooled) {
    const ends = JSON.stringify([
      pooled.length,
      pooled.at(-1),
      series.map((s) => [s.id, s.points.length, s.points.at(-1)]),
    ]);
    if (ends === this.ends) return;
    Object.assign(this, { series, pooled, ends });
    this.draw();
  }

  light(id) {
    this.lit = id;
    this.mark();
  }

  colour(index) {
    return this.series.length <= COLOURS ? `var(--c${index})` : null;
  }

  draw() {
    const points = [...this.pooled, ...this.series.flatMap((s) => s.points)];
    if (!points.length) {
      this.box.replaceChildren(el("p", { class: "empty" }, "No evaluation has come back yet."));
      return;
    }
    const focused = this.root && this.root === document.activeElement;
    const f = frame(this.box, this.words());
    const rounds = points.map((p) => p[0]);
    const shares = points.map((p) => p[1]);
    this.first = Math.min(...rounds);
    this.last = Math.max(this.first + 1, ...rounds);
    const low = Math.max(0, Math.min(0.8, Math.floor(10 * Math.min(...shares)) / 10));
    const high = Math.min(1, Math.max(low + 0.2, Math.ceil(10 * Math.max(...shares)) / 10));
    const step = high - low > 0.5 ? 0.2 : 0.1;
    const levels = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9; k++) levels.push(k * step);
    this.x = (round) => f.left + ((round - this.first) / (this.last - this.first)) * (f.right - f.left);
    this.y = (share) => f.bottom - ((share - low) / (high - low)) * (f.bottom - f.top);
    axes(
      f,
      this.x,
      roundSteps(this.first, this.last, f.right - f.left),
      this.y,
      levels,
      (l) => `${Math.round(100 * l)} %`,
    );
    Object.assign(this, { root: f.root, frame: f });
    this.series.forEach((one, i) => this.line(one.points, "board", one.id, this.colour(i)));
    this.line(this.pooled, "pooled", null, null);
    f.root.addEventListener("pointermove", (event) => this.point(event));
    f.root.addEventListener("pointerleave", () => this.leave());
    f.root.addEventListener("blur", () => this.leave());
    f.root.addEventListener("keydown", (event) => this.key(event));
    this.box.replaceChildren(f.root);
    if (focused) f.root.focus({ preventScroll: true });
    this.mark();
    if (this.at !== null) this.cross(this.at, false);
  }

  line(points, kind, id, colour) {
    if (!points.length) return;
    const path = points.map(
      ([round, share], i) => `${i ? "L" : "M"}${this.x(round).toFixed(1)} ${this.y(share).toFixed(1)}`,
    );
    const look = kind === "pooled" ? "pooled" : colour ? "" : "rest";
    const line = svg("path", { class: `line ${look}`, d: path.join("") });
    const [round, share] = points.at(-1);
    const end = svg("circle", {
      class: `end ${look}`,
      cx: this.x(round),
      cy: this.y(share),
      r: kind === "pooled" ? 5 : 3.5,
    });
    if (colour) {
      line.style.stroke = colour;
      end.style.fill = colour;
    }
    if (id !== null) line.dataset.board = end.dataset.board = id;
    this.root.append(line);
    if (look !== "rest") this.root.append(end);
  }

  mark() {
    if (!this.root) return;
    this.root.classList.toggle("lit", this.lit !== null);
    for (const part of this.root.querySelectorAll("[data-board]")) {
      part.classList.toggle("on", part.dataset.board === this.lit);
      if (part.dataset.board === this.lit && part.classList.contains("rest")) this.root.append(part);
    }
  }

  point(event) {
    const box = this.root.getBoundingClientRect();
    const share = (event.clientX - box.left - this.frame.left) / (this.frame.right - this.frame.left);
    this.cross(this.nearest(this.first + share * (this.last - this.first)), false);
  }

  nearest(round) {
    const known = [...new Set([...this.pooled, ...this.series.flatMap((s) => s.points)].map((p) => p[0]))];
    return known.reduce((best, r) => (Math.abs(r - round) < Math.abs(best - round) ? r : best), known[0]);
  }

  key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") return this.leave();
    if (!step) return null;
    event.preventDefault();
    const known = [...new Set([...this.pooled, ...this.series.flatMap((s) => s.points)].map((p) => p[0]))].sort(
      (a, b) => a - b,
    );
    const now = this.at === null ? (step > 0 ? -1 : known.length) : known.indexOf(this.at);
    return this.cross(known[Math.max(0, Math.min(known.length - 1, now + step))], true);
  }

  cross(round, aloud) {
    this.at = round;
    this.root.querySelector(".cross")?.remove();
    const x = this.x(round);
    this.root.append(svg("line", { class: "cross", x1: x, x2: x, y1: this.frame.top, y2: this.frame.bottom }));
    const rows = this.values(round);
    this.tip.replaceChildren(
      el("b", {}, `Round ${number(round)}`),
      ...rows.map(([name, share]) => el("div", {}, el("span", {}, name), el("span", {}, percent(share)))),
    );
    this.tip.hidden = false;
    const box = this.root.getBoundingClientRect();
    const right = x > this.frame.width / 2;
    const left = box.left + window.scrollX + x + (right ? -14 - this.tip.offsetWidth : 14);
    this.tip.style.left = `${Math.max(4, left)}px`;
    this.tip.style.top = `${box.top + window.scrollY + 12}px`;
    if (aloud) this.say(`Round ${round}: ${rows.map(([name, share]) => `${name} ${percent(share)}`).join(", ")}`);
  }

  values(round) {
    const at = (points) => points.find((p) => p[0] === round)?.[1];
    const rows = [["pooled", at(this.pooled)]];
    const boards = this.series.map((s) => [s.id, at(s.points)]).filter((b) => b[1] !== undefined);
    boards.sort((a, b) => b[1] - a[1]);
    if (boards.length <= COLOURS) rows.push(...boards);
    else rows.push([`best: ${boards[0][0]}`, boards[0][1]], [`worst: ${boards.at(-1)[0]}`, boards.at(-1)[1]]);
    if (this.lit !== null && boards.length > COLOURS) rows.push(...boards.filter((b) => b[0] === this.lit));
    return rows.filter((row) => row[1] !== undefined);
  }

  leave() {
    this.at = null;
    this.tip.hidden = true;
    this.root?.querySelector(".cross")?.remove();
  }

  words() {
    const last = this.pooled.at(-1);
    const fleet = last ? `the fleet has ${percent(last[1])} after round ${last[0]}` : "no pooled figure yet";
    const ends = this.series.map((s) => s.points.at(-1)?.[1]).filter((v) => v !== undefined);
    const boards = ends.length
      ? `, ${ends.length} boards between ${percent(Math.min(...ends))} and ${percent(Math.max(...ends))}`
      : "";
    return `Accuracy over rounds: ${fleet}${boards}. Arrow keys go through the rounds.`;
  }
}

// Bars up and down from one line; rounds: history of the status.
export class BytesChart {
  constructor(box) {
    Object.assign(this, { box, rounds: [] });
    new ResizeObserver(() => this.draw()).observe(box);
  }

  update(rounds) {
    const same = rounds.length && rounds.at(-1).round === this.rounds.at(-1)?.round;
    this.rounds = rounds;
    if (!same) this.draw();
  }

  draw() {
    if (!this.rounds.length) {
      this.box.replaceChildren(el("p", { class: "empty" }, "No round has ended yet."));
      return;
    }
    const f = frame(this.box, this.words());
    f.root.removeAttribute("tabindex");
    const shown = this.rounds.slice(-Math.max(8, Math.floor((f.right - f.left) / 6)));
    const up = Math.max(1, ...shown.map((r) => r.bytes_up));
    const down = Math.max(1, ...shown.map((r) => r.bytes_down));
    const room = f.bottom - f.top - 8;
    const middle = f.top + 4 + (room * up) / (up + down);
    const scale = room / (up + down);
    const width = Math.min(36, (f.right - f.left) / shown.length);
    const x = (round) => f.left + (shown.findIndex((r) => r.round === round) + 0.5) * width;
    const step = nice((up + down) / 5);
    const levels = [];
    for (let level = 0; level <= up; level += step) levels.push(level);
    for (let level = -step; level >= -down; level -= step) levels.push(level);
    const marks = roundSteps(shown[0].round, shown.at(-1).round, width * shown.length).filter((r) =>
      shown.some((s) => s.round === r),
    );
    f.root.append(hatch("up"), hatch("down"));
    axes(
      f,
      x,
      marks,
      (level) => middle - level * scale,
      levels,
      (level) => size(Math.abs(level)),
    );
    for (const round of shown)
      this.bar(f, x(round.round), Math.max(1, width - Math.min(3, width / 4)), round, middle, scale);
    this.box.replaceChildren(f.root);
  }

  bar(f, x, width, round, middle, scale) {
    const words = `Round ${round.round}: ${size(round.bytes_up)} up, ${size(round.bytes_down)} down`;
    const given = round.state === "abandoned" ? ", given up" : "";
    const part = (kind, y, height) => {
      const look = svg("rect", {
        class: kind,
        x: x - width / 2,
        y,
        width,
        height: Math.max(0, height),
        rx: Math.min(2, width / 4),
      });
      if (given) look.style.fill = `url(#hatch-${kind})`;
      return look;
    };
    const up = round.bytes_up * scale;
    f.root.append(
      svg(
        "g",
        {},
        svg("title", {}, words + given),
        part("up", middle - up, up),
        part("down", middle + 1, round.bytes_down * scale - 1),
      ),
    );
  }

  words() {
    const sum = (key) => this.rounds.reduce((total, round) => total + round[key], 0);
    const [up, down] = [size(sum("bytes_up")), size(sum("bytes_down"))];
    return `Bytes per round: ${up} up and ${down} down in ${this.rounds.length} rounds.`;
  }
}

function hatch(kind) {
  const pattern = {
    id: `hatch-${kind}`,
    width: 4,
    height: 4,
    patternUnits: "userSpaceOnUse",
    patternTransform: "rotate(45)",
  };
  return svg(
    "pattern",
    pattern,
    svg("line", { class: `hatch-${kind}`, x1: 0, x2: 0, y1: 0, y2: 4, "stroke-width": 3 }),
  );
}

function nice(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, value)));
  return Math.max(1, power * ([1, 2, 5].find((k) => k * power >= 0.7 * value) ?? 10));
}

export function spark(points) {
  if (!points.length) return "";
  const [width, height] = [90, 22];
  const shares = points.map((p) => p[1]);
  const [low, high] = [Math.min(...shares), Math.max(...shares)];
  const x = (i) => 3 + (i / Math.max(1, points.length - 1)) * (width - 6);
  const y = (share) => height - 3 - ((share - low) / Math.max(0.02, high - low)) * (height - 6);
  const path = shares.map((share, i) => `${i ? "L" : "M"}${x(i).toFixed(1)} ${y(share).toFixed(1)}`).join("");
  const end = svg("circle", { cx: x(shares.length - 1), cy: y(shares.at(-1)), r: 2.5 });
  return svg(
    "svg",
    { class: "spark", viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" },
    svg("path", { d: path }),
    end,
  );
}
