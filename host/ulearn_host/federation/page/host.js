// Asks the host for its status, once a second, and says at the top of the page when it does not answer.

import { clock, put, show } from "./elements.js";

const EVERY_MS = 1000;
const HIDDEN_MS = 10000; // while nobody looks at the page
const PATIENCE_MS = 8000;
const GONE = "The host does not answer.";
const STRANGER = "The host does not know this page's key any more: open the address that it has printed.";
const OVER = "The job is done and its host has ended; these are its last figures.";

export class Host {
  constructor(take) {
    this.take = take; // told of every new status
    this.received = 0; // when the last one came, in ms
    this.failing = false;
    this.done = false;
    this.tag = null;
  }

  async poll() {
    try {
      await this.ask();
      this.alive();
    } catch (problem) {
      this.lost(problem);
      if (!(problem instanceof NoAnswer)) throw problem;
    } finally {
      setTimeout(() => this.poll(), document.hidden ? HIDDEN_MS : EVERY_MS);
    }
  }

  async ask() {
    let answer;
    try {
      const headers = this.tag ? { "If-None-Match": this.tag } : {};
      answer = await fetch("status.json", { headers, cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    } catch {
      throw new NoAnswer(GONE);
    }
    if (answer.status === 304) return;
    if (answer.status === 401 || answer.status === 403) throw new NoAnswer(STRANGER);
    if (!answer.ok) throw new NoAnswer(`The host answers with an error (${answer.status}).`);
    let status;
    try {
      status = await answer.json();
    } catch {
      throw new NoAnswer(GONE);
    }
    this.tag = answer.headers.get("ETag");
    this.received = Date.now();
    this.done = status.state === "done";
    this.take(status);
  }

  alive() {
    this.failing = false;
    document.getElementById("live").dataset.state = "live";
    put("live-text", this.done ? "job done" : "live");
    show("banner", false);
  }

  lost(problem) {
    this.failing = true;
    const over = this.done && problem.message === GONE;
    const from = this.received ? ` The figures are from ${clock(this.received / 1000)}.` : "";
    document.getElementById("live").dataset.state = "gone";
    document.getElementById("banner").dataset.state = over ? "done" : "gone";
    put("live-text", over ? "host has ended" : "host gone");
    put("banner", over ? OVER : `${problem.message}${from} Trying again.`);
    show("banner", true);
  }
}

class NoAnswer extends Error {}
