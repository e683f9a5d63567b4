// Server-sent events read from a fetch body (WHATWG HTML, "Event stream interpretation").
// Knows bytes and events; nothing about chat. Any cut of the bytes gives the same events.

/** Turns byte chunks into `{event, data}`; keeps what is not finished until the next chunk. */
export class EventDecoder {
  #utf8 = new TextDecoder("utf-8");
  #text = "";
  #event = "";
  #data = [];

  /** @param {Uint8Array} bytes  @returns {{event: string, data: string}[]} the events that these bytes complete */
  push(bytes) {
    this.#text += this.#utf8.decode(bytes, { stream: true });
    const events = [];
    let start = 0;
    for (const end of this.#text.matchAll(/\r\n|\n|\r/g)) {
      // A CR at the very end may be half of a CRLF: wait for the next chunk.
      if (end[0] === "\r" && end.index === this.#text.length - 1) break;
      this.#line(this.#text.slice(start, end.index), events);
      start = end.index + end[0].length;
    }
    this.#text = this.#text.slice(start);
    return events;
  }

  #line(line, events) {
    if (line === "") {
      if (this.#data.length > 0) events.push({ event: this.#event || "message", data: this.#data.join("\n") });
      this.#event = "";
      this.#data = [];
      return;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon); // an empty field is a comment
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "data") this.#data.push(value);
    else if (field === "event") this.#event = value;
  }
}

/** Yields the events of a response body; leaving the loop early cancels the body. */
export async function* readEvents(body) {
  const reader = body.getReader();
  const decoder = new EventDecoder();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* decoder.push(value);
    }
  } finally {
    reader.cancel().catch(() => {}); // already closed or aborted: nothing left to free
  }
}
