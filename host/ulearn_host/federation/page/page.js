// What the host says of its fleet: job, round, boards, models, refusals.

import { AccuracyChart, BytesChart, spark } from "./charts.js";
import { ago, clock, duration, el, number, percent, plural, put, show, size, svg } from "./elements.js";
import { Host } from "./host.js";
import { LiveTable } from "./tables.js";

const ROUNDS_SHOWN = 20;
const COLOURS = 8;
const STATES = {
  select: ["choosing boards", "busy"],
  configure: ["handing out tasks", "busy"],
  collect: ["collecting", "busy"],
  commit: ["committing", "busy"],
  abandon: ["given up", "warn"],
  done: ["done", "good"],
};
const BOARD_TONES = { training: "busy", late: "warn", gone: "bad", refused: "bad" };

let status = null;
let everyRound = false;
let pressed = null; // the board whose line stays lit

const chart = new AccuracyChart(document.getElementById("accuracy-chart"), document.getElementById("tip"), (text) =>
  put("news", text),
);
const bytes = new BytesChart(document.getElementById("bytes-chart"));
const short = (id) => (id ? id.slice(0, 8) : "");
const last = (board) => board.accuracy.at(-1)?.[1] ?? null;
const ends = (board) => `${board.accuracy.length} ${board.accuracy.at(-1) ?? ""}`;
const since = () => (Date.now() - host.received) / 1000;
const host = new Host((fresh) => {
  const before = status;
  status = fresh;
  draw();
  news(before);
});
const pill = (text, tone, title) =>
  el("span", { class: "pill", "data-tone": tone ?? null, title: title ?? null }, text);

const boards = new LiveTable(
  "boards-table",
  (board) => board.id,
  [
    { title: "Board", heading: true, kind: "name", cell: (b) => b.id, order: (b) => b.id },
    { title: "State", cell: (b) => pill(b.state, BOARD_TONES[b.state]), same: (b) => b.state, order: (b) => b.state },
    { title: "Link", kind: "name", cell: (b) => b.link, order: (b) => b.link },
    { title: "Accuracy", numeric: true, cell: (b) => (b.accuracy.length ? percent(last(b)) : ""), order: last },
    { title: "Over rounds", cell: (b) => spark(b.accuracy), same: ends },
    { title: "Rounds", numeric: true, cell: (b) => number(b.rounds), order: (b) => b.rounds },
    { title: "Samples", numeric: true, cell: (b) => number(b.samples), order: (b) => b.samples },
    {
      title: "Seen",
      numeric: true,
      cell: (b) => ago(b.seen_s === null ? null : b.seen_s + since()),
      order: (b) => b.seen_s,
    },
    {
      title: "Step",
      numeric: true,
      cell: (b) => (b.step_us ? duration(b.step_us / 1e6) : ""),
      order: (b) => b.step_us,
    },
    { title: "Up", numeric: true, cell: (b) => size(b.bytes_up), order: (b) => b.bytes_up },
    { title: "Down", numeric: true, cell: (b) => size(b.bytes_down), order: (b) => b.bytes_down },
    { title: "Refused", numeric: true, cell: (b) => number(b.refused), order: (b) => b.refused },
  ],
  { sorted: { index: 0, down: false }, caption: "Boards of the fleet", point: (id) => chart.light(id ?? pressed) },
);

const rounds = new LiveTable(
  "rounds-table",
  (round) => round.round,
  [
    { title: "Round", heading: true, cell: (r) => number(r.round) },
    {
      title: "State",
      cell: (r) => pill(r.state, r.state === "committed" ? "good" : "warn", r.reason),
      same: (r) => r.state,
    },
    {
      title: "Model",
      cell: (r) => (r.made ? el("span", { class: "id", title: r.made }, short(r.made)) : ""),
      same: (r) => r.made ?? "",
    },
    {
      title: "From",
      cell: (r) => el("span", { class: "id from", title: r.from }, short(r.from)), // which leaves "the plan" whole
      same: (r) => r.from,
    },
    { title: "Accuracy", numeric: true, cell: (r) => (r.accuracy === null ? "" : percent(r.accuracy)) },
    { title: "Updates", numeric: true, cell: (r) => `${number(r.updates)} of ${number(r.asked)}` },
    { title: "Late", numeric: true, cell: (r) => number(r.late) },
    { title: "Refused", numeric: true, cell: (r) => number(r.refused) },
    { title: "Up", numeric: true, cell: (r) => size(r.bytes_up) },
    { title: "Down", numeric: true, cell: (r) => size(r.bytes_down) },
    { title: "Time", numeric: true, cell: (r) => duration(r.seconds) },
  ],
  { caption: "Rounds, the newest first, and the model that each made from the one before" },
);

const refused = new LiveTable(
  "refused-table",
  (one) => one.key,
  [
    { title: "Time", cell: (r) => clock(r.time) },
    { title: "Board", kind: "name", cell: (r) => r.board ?? "unknown" },
    { title: "Reason", kind: "reason", cell: (r) => r.reason },
  ],
  { caption: "Refused updates, the newest first" },
);

function draw() {
  const { job, history } = status;
  document.title = `${job.name}: round ${status.round} of ${job.rounds}`;
  put("job", job.name);
  const encodings = `up ${job.up}, down ${job.down}`;
  put(
    "terms",
    `${job.plan} · ${job.rule} of ${plural(job.goal, "board")} · ${encodings} · boards chosen: ${job.selection}`,
  );
  drawRound();
  drawAccuracy(history);
  drawBoards();
  drawBytes(history);
  drawRounds(history);
  drawRefused();
}

function drawRound() {
  const { job } = status;
  put("round", number(status.round));
  put("rounds", `of ${number(job.rounds)}`);
  const [words, tone] = STATES[status.state] ?? [status.state, "busy"];
  put("state", words);
  document.getElementById("state").dataset.tone = tone;
  const bar = document.getElementById("progress");
  bar.max = Math.max(1, job.goal);
  bar.value = status.state === "done" ? bar.max : status.received;
  put(
    "received",
    status.state === "done"
      ? ""
      : `${number(status.received)} of ${number(job.goal)} updates, ${plural(status.asked, "board")} asked`,
  );
  drawClock();
}

function drawClock() {
  if (status.deadline_s === null || status.state === "done") return put("deadline", "");
  const left = Math.ceil(status.deadline_s - since());
  return put("deadline", left > 0 ? `· ${duration(left)} left` : "· the deadline has passed");
}

function drawAccuracy(history) {
  const pooled = history.filter((r) => r.accuracy !== null).map((r) => [r.round, r.accuracy]);
  if (status.accuracy_before !== null) pooled.unshift([0, status.accuracy_before]);
  const series = status.boards.filter((b) => b.accuracy.length).map((b) => ({ id: b.id, points: b.accuracy }));
  chart.update(series, pooled);
  const now = pooled.at(-1);
  put("accuracy", now ? percent(now[1]) : "–");
  const gain = now && pooled.length > 1 ? 100 * (now[1] - pooled[0][1]) : null;
  const start = pooled[0]?.[0] ? `since round ${pooled[0][0]}` : "over the plan";
  const from = gain === null ? "" : `${gain < 0 ? "−" : "+"}${Math.abs(gain).toFixed(1)} points ${start}`;
  put("accuracy-more", now ? from || "before any round" : "not evaluated yet");
  put(
    "accuracy-note",
    series.length
      ? "Thick: pooled over the boards' held-out samples; thin: each board."
      : pooled.length
        ? "Pooled over the boards' held-out samples; single boards are not shown."
        : "",
  );
  drawLegend(series);
}

function drawLegend(series) {
  const box = document.getElementById("legend");
  const few = series.length <= COLOURS;
  const wanted = series.map((s) => s.id);
  if (box.dataset.boards !== JSON.stringify(wanted)) {
    box.dataset.boards = JSON.stringify(wanted);
    box.replaceChildren(...wanted.map((id, i) => legendButton(id, few ? `var(--c${i})` : "var(--rest)")));
  }
  box.hidden = !series.length;
  for (const button of box.children) button.setAttribute("aria-pressed", String(button.dataset.board === pressed));
}

function legendButton(id, colour) {
  const sample = svg(
    "svg",
    { width: 14, height: 8, "aria-hidden": "true" },
    svg("line", { x1: 1, x2: 13, y1: 4, y2: 4, "stroke-width": 3, "stroke-linecap": "round" }),
  );
  sample.firstChild.style.stroke = colour;
  const light = () => chart.light(id);
  const dark = () => chart.light(pressed);
  const press = () => {
    pressed = pressed === id ? null : id;
    chart.light(pressed);
    for (const other of button.parentNode.children)
      other.setAttribute("aria-pressed", String(other.dataset.board === pressed));
  };
  const events = { pointerenter: light, pointerleave: dark, focus: light, blur: dark, click: press };
  const button = el("button", { type: "button", "data-board": id, title: id, ...events }, sample, el("span", {}, id));
  return button;
}

function drawBoards() {
  boards.update(status.boards);
  show("boards-empty", !status.boards.length);
  const count = (state) => status.boards.filter((b) => b.state === state).length;
  const here = status.boards.length - count("gone");
  put("here", `${number(here)}`);
  document.getElementById("here").append(el("span", { class: "of" }, ` of ${number(status.boards.length)} here`));
  const parts = ["training", "late", "refused", "gone"]
    .filter(count)
    .map((state) => `${number(count(state))} ${state}`);
  put("here-more", parts.join(", ") || "none has a task");
}

function drawBytes(history) {
  bytes.update(history);
  const sum = (key) => status.boards.reduce((total, board) => total + board[key], 0);
  const [total, unit] = size(sum("bytes_up") + sum("bytes_down")).split(" ");
  put("bytes", total);
  document.getElementById("bytes").append(el("span", { class: "unit" }, ` ${unit}`));
  put("bytes-more", `${size(sum("bytes_up"))} up, ${size(sum("bytes_down"))} down`);
}

function drawRounds(history) {
  let from = history[0]?.round === 1 ? "the plan" : "…"; // before the rounds that the host still tells of
  const lines = history.map((round) => {
    const made = round.state === "committed" ? round.base_id : null;
    const line = { ...round, made, from };
    from = made ?? from;
    return line;
  });
  lines.reverse();
  const shown = everyRound ? lines : lines.slice(0, ROUNDS_SHOWN);
  rounds.update(shown);
  show("rounds-empty", !lines.length);
  show("all-rounds", lines.length > ROUNDS_SHOWN && !everyRound);
  put("all-rounds", `Show all ${number(lines.length)} rounds`);
  const { base_id: now, parent } = status.model;
  put(
    "lineage",
    now
      ? `The fleet's model is ${short(now)}, ${parent ? `made from ${short(parent)}` : "as it stands in the plan"}.`
      : "",
  );
}

function drawRefused() {
  const times = new Map();
  const lines = status.refused.map((one) => {
    const key = JSON.stringify([one.time, one.board, one.reason]);
    times.set(key, (times.get(key) ?? 0) + 1);
    return { ...one, key: `${key} ${times.get(key)}` };
  });
  lines.sort((a, b) => b.time - a.time);
  refused.update(lines);
  show("refused-empty", !lines.length);
  const total = status.boards.reduce((sum, board) => sum + board.refused, 0);
  put("refused-count", number(Math.max(total, lines.length)));
  put("refused-more", lines.length ? `last: ${lines[0].board ?? "unknown"}` : "nothing");
}

function news(before) {
  const fresh = status.history.at(-1);
  if (!before || !fresh || before.history.at(-1)?.round === fresh.round) return;
  put(
    "news",
    `Round ${fresh.round} ${fresh.state}${fresh.accuracy === null ? "" : `, accuracy ${percent(fresh.accuracy)}`}`,
  );
}

document.getElementById("all-rounds").addEventListener("click", () => {
  everyRound = true;
  drawRounds(status.history);
});
setInterval(() => {
  if (!status || host.failing) return;
  drawClock();
  if (since() > 1.5) boards.update(status.boards);
}, 1000);
host.poll();
