// The conversation on the page: bubbles, notes, and a scroll position that respects the reader.
// All text enters through text nodes and textContent: nothing in a message can become markup.

import { t } from "./i18n.js";

const NEAR_END_PX = 64;

/** One streamed answer. Text is drawn once per frame, however many deltas arrive. */
class Answer {
  text = "";
  #drawn = 0;
  #frame = 0;
  #node = document.createTextNode("");
  #turn;
  #bubble;
  #onGrowth;

  constructor(turn, bubble, onGrowth) {
    this.#turn = turn;
    this.#bubble = bubble;
    this.#onGrowth = onGrowth;
    bubble.append(this.#node);
    bubble.classList.add("waiting");
  }

  append(delta) {
    this.text += delta;
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  /** Draw what is left and put `note` (already stopped, cut off, the model's name) under the bubble. */
  finish(...notes) {
    cancelAnimationFrame(this.#frame);
    this.#draw();
    this.#bubble.classList.remove("waiting");
    if (!this.text) this.#bubble.hidden = true;
    for (const { text, kind } of notes) this.#turn.append(element("p", `note ${kind}`, text));
    this.#onGrowth();
  }

  #draw() {
    this.#frame = 0;
    if (this.#drawn === this.text.length) return;
    this.#node.appendData(this.text.slice(this.#drawn));
    this.#drawn = this.text.length;
    this.#onGrowth();
  }
}

export class Transcript {
  #log;
  #empty;
  #jump;
  #isFollowing = true;
  #lastTop = 0;

  constructor(log, empty, jump) {
    this.#log = log;
    this.#empty = empty;
    this.#jump = jump;
    log.addEventListener("scroll", () => this.#onScroll(), { passive: true });
    jump.addEventListener("click", () => this.#follow());
    new ResizeObserver(() => this.#onGrowth()).observe(log);
  }

  addQuestion(text) {
    this.#empty.hidden = true;
    this.#addTurn("question").bubble.textContent = text;
    this.#follow();
  }

  addAnswer() {
    const { turn, bubble } = this.#addTurn("answer");
    this.#log.setAttribute("aria-busy", "true");
    this.#follow();
    return new Answer(turn, bubble, () => this.#onGrowth());
  }

  setIdle() {
    this.#log.setAttribute("aria-busy", "false");
  }

  clear() {
    this.#log.replaceChildren(this.#empty);
    this.#empty.hidden = false;
    this.#follow();
  }

  #addTurn(role) {
    const row = element("article", `turn ${role}`);
    const avatar = element("span", "avatar", t(`${role}_avatar`));
    const turn = element("div", "body");
    const bubble = element("div", "bubble");
    bubble.dir = "auto";
    turn.append(bubble);
    row.append(avatar, turn);
    this.#log.append(row);
    return { turn, bubble };
  }

  get #distance() {
    return this.#log.scrollHeight - this.#log.scrollTop - this.#log.clientHeight;
  }

  // Only a move upwards is the reader's wish: text that arrives also makes the end farther away.
  #onScroll() {
    const isNear = this.#distance <= NEAR_END_PX;
    if (isNear) this.#isFollowing = true;
    else if (this.#log.scrollTop < this.#lastTop) this.#isFollowing = false;
    this.#lastTop = this.#log.scrollTop;
    this.#jump.hidden = this.#isFollowing;
  }

  #onGrowth() {
    if (this.#isFollowing) this.#log.scrollTop = this.#log.scrollHeight;
    this.#jump.hidden = this.#isFollowing;
  }

  #follow() {
    this.#isFollowing = true;
    this.#onGrowth();
  }
}

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}
