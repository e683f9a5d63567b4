// The page's side of the OpenAI API: models, one streamed chat answer, the key. Touches no element.

import { readEvents } from "./sse.js";

const KEY_SLOT = "qloop.api_key";
let key = "";
try {
  key = sessionStorage.getItem(KEY_SLOT) ?? "";
} catch {
  // Storage is switched off: the key lives as long as the page.
}

/** What went wrong, in the fields of OpenAI's envelope. `kind` names a text of the page when the server gave none. */
export class ApiError extends Error {
  constructor({ kind = null, message = "", code = null, status = null, retryAfter = null }) {
    super(message);
    Object.assign(this, { kind, code, status, retryAfter });
  }
}

export function setKey(value) {
  key = value;
  try {
    sessionStorage.setItem(KEY_SLOT, value);
  } catch {
    // As above.
  }
}

/** @returns {Promise<{id: string, parent: string|null}[]>} */
export async function listModels() {
  const response = await request("v1/models", {});
  const body = await response.json().catch(() => null);
  if (!Array.isArray(body?.data)) throw new ApiError({ kind: "error_unreadable" });
  return body.data.map((model) => ({ id: String(model.id), parent: model.parent ?? null }));
}

/**
 * Stream one answer; `onDelta` gets each new piece of text.
 * @returns {Promise<{model: string, finishReason: string}>} the model that the server says has answered
 * @throws {ApiError} the server refused, failed midway or vanished; AbortError when `signal` fired
 */
export async function streamChat({ model, messages, signal, onDelta }) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ model, messages, stream: true }),
    signal,
  });
  const outcome = { model, finishReason: null };
  try {
    for await (const { data } of readEvents(response.body)) {
      if (data === "[DONE]") break;
      readChunk(JSON.parse(data), outcome, onDelta);
    }
  } catch (error) {
    if (error instanceof ApiError || signal.aborted) throw error;
    throw new ApiError({ kind: error instanceof SyntaxError ? "error_unreadable" : "error_broken" });
  }
  if (outcome.finishReason === null) throw new ApiError({ kind: "error_broken" });
  return outcome;
}

function readChunk(chunk, outcome, onDelta) {
  if (chunk.error) throw fromEnvelope(chunk.error);
  if (chunk.model) outcome.model = chunk.model;
  const choice = chunk.choices?.[0];
  if (choice?.delta?.content) onDelta(choice.delta.content);
  if (choice?.finish_reason) outcome.finishReason = choice.finish_reason;
}

async function request(path, options) {
  const headers = new Headers(options.headers);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError({ kind: "error_network" });
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw fromEnvelope(body?.error, response);
}

function fromEnvelope(error, response = null) {
  const status = response?.status ?? null;
  const seconds = Number.parseInt(response?.headers.get("Retry-After") ?? "", 10);
  return new ApiError({
    kind: error?.message ? null : "error_unreadable",
    message: String(error?.message ?? ""),
    code: error?.code ?? (status === null ? null : String(status)),
    status,
    retryAfter: Number.isNaN(seconds) ? null : seconds,
  });
}
