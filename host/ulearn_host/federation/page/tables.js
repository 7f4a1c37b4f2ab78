// Tables whose rows keep their place in the document while their cells change, so that a selection or the focus stays.

import { el } from "./elements.js";

export class LiveTable {
  // columns: {title, cell(row) → text or node, same(row): text that stands for a node, which is made anew only when
  // that changes, order(row) to sort by, numeric, kind: a class, heading: of the row}
  constructor(id, key, columns, { sorted = null, caption, point = null }) {
    this.key = key;
    this.point = point; // told of the row under the pointer, then of null
    this.columns = columns;
    this.sorted = sorted;
    this.rows = new Map();
    this.heads = columns.map((column, i) => {
      const inside = column.order
        ? el("button", { type: "button", click: () => this.sort(i) }, column.title)
        : column.title;
      return el("th", { scope: "col", class: column.numeric ? "n" : null }, inside);
    });
    this.body = el("tbody");
    document
      .getElementById(id)
      .append(el("caption", { class: "hidden" }, caption), el("thead", {}, el("tr", {}, ...this.heads)), this.body);
    this.mark();
  }

  sort(index) {
    const numeric = this.columns[index].numeric;
    const same = this.sorted?.index === index;
    this.sorted = { index, down: same ? !this.sorted.down : Boolean(numeric) };
    this.mark();
    this.update(this.data);
  }

  mark() {
    this.heads.forEach((head, i) => {
      if (this.sorted?.index !== i) head.removeAttribute("aria-sort");
      else head.setAttribute("aria-sort", this.sorted.down ? "descending" : "ascending");
    });
  }

  update(data) {
    this.data = data;
    const seen = new Set();
    let place = this.body.firstChild;
    for (const row of this.ordered(data)) {
      const key = this.key(row);
      seen.add(key);
      const line = this.rows.get(key) ?? this.line(key);
      if (line === place) place = place.nextSibling;
      else this.body.insertBefore(line, place);
      this.columns.forEach((column, i) => fill(line.children[i], column, row));
    }
    for (const [key, line] of this.rows) {
      if (seen.has(key)) continue;
      line.remove();
      this.rows.delete(key);
    }
  }

  ordered(data) {
    if (!this.sorted) return data;
    const { index, down } = this.sorted;
    const order = this.columns[index].order;
    const sign = down ? -1 : 1;
    return [...data].sort((a, b) => sign * compared(order(a), order(b)));
  }

  line(key) {
    const cells = this.columns.map((column) => {
      const kind = [column.numeric ? "n" : "", column.kind ?? ""].join(" ").trim();
      return column.heading ? el("th", { scope: "row", class: kind || null }) : el("td", { class: kind || null });
    });
    const events = this.point ? { pointerenter: () => this.point(key), pointerleave: () => this.point(null) } : {};
    const line = el("tr", events, ...cells);
    this.rows.set(key, line);
    return line;
  }
}

const filled = new WeakMap();

function fill(cell, column, row) {
  const content = column.same ? column.same(row) : column.cell(row);
  if (filled.get(cell) === content) return;
  filled.set(cell, content);
  cell.replaceChildren(column.same ? column.cell(row) : content);
  if (column.kind === "name") cell.title = content;
}

const words = new Intl.Collator("en", { numeric: true });

function compared(a, b) {
  if (a === b) return 0;
  if (a === null || a === undefined) return -1;
  if (b === null || b === undefined) return 1;
  return typeof a === "string" ? words.compare(a, b) : a - b;
}
