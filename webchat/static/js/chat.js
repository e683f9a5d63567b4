// The chat page: wires the box, the model list, the transcript and the API together.

import { ApiError, listModels, setKey, streamChat } from "./api.js";
import { loadTexts, t } from "./i18n.js";
import { Transcript } from "./transcript.js";

const $ = (id) => document.getElementById(id);
const box = $("question");
const picker = $("model");
const transcript = new Transcript($("log"), $("empty"), $("to-latest"));

let history = []; // OpenAI messages; only turns that got an answer
let running = null; // the AbortController of the answer being streamed

async function start() {
  await loadTexts();
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  box.addEventListener("keydown", onKey);
  box.addEventListener("input", refreshBox);
  picker.addEventListener("change", refreshBox);
  $("stop").addEventListener("click", () => running?.abort());
  $("new-chat").addEventListener("click", newChat);
  $("retry").addEventListener("click", showModels);
  await showModels();
}

// While an input method composes, Enter picks a word. Safari ends the composition first and leaves keyCode 229.
function onKey(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  send();
}

function refreshBox() {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`; // the borders
  $("send").disabled = !picker.value || !box.value.trim();
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
}

async function send() {
  const question = box.value.trimEnd();
  if (running || !picker.value || !question.trim()) return;
  const controller = new AbortController();
  const turns = history; // "new chat" starts another list; a late answer must not reach it
  running = controller;
  box.value = "";
  refreshBox();
  transcript.addQuestion(question);
  const answer = transcript.addAnswer();
  $("status").textContent = t("answering");
  const asked = { role: "user", content: question };
  try {
    const outcome = await withKey(() =>
      streamChat({
        model: picker.value,
        messages: [...turns, asked],
        signal: controller.signal,
        onDelta: (delta) => answer.append(delta),
      }),
    );
    const notes = [{ kind: "", text: outcome.model }];
    if (outcome.finishReason === "length") notes.push({ kind: "warning", text: t("cut_off") });
    answer.finish(...notes);
  } catch (error) {
    if (controller.signal.aborted) answer.finish({ kind: "warning", text: t("stopped") });
    else answer.finish({ kind: "error-text", text: `${t("failed")}: ${describe(error)}` });
    if (!answer.text && !box.value && turns === history) box.value = question;
  }
  if (answer.text) turns.push(asked, { role: "assistant", content: answer.text });
  if (running === controller) settle(controller.signal.aborted ? t("stopped") : t("answered"));
}

function settle(status) {
  running = null;
  transcript.setIdle();
  $("status").textContent = status;
  refreshBox();
  box.focus();
}

function newChat() {
  running?.abort();
  history = [];
  transcript.clear();
  settle("");
}

async function showModels() {
  const chosen = picker.value;
  picker.disabled = true;
  $("notice").hidden = true;
  picker.replaceChildren(new Option(t("model_loading"), ""));
  try {
    const models = await withKey(listModels);
    fillPicker(models);
    if (models.some((model) => model.id === chosen)) picker.value = chosen;
    picker.disabled = models.length === 0;
  } catch (error) {
    picker.replaceChildren(new Option(t("model_none"), ""));
    $("notice-text").textContent = `${t("models_failed")} ${describe(error)}`;
    $("notice").hidden = false;
  }
  refreshBox();
}

function fillPicker(models) {
  const groups = [
    [t("models_base"), models.filter((model) => model.parent === null)],
    [t("models_adapters"), models.filter((model) => model.parent !== null)],
  ];
  picker.replaceChildren();
  for (const [label, members] of groups.filter(([, members]) => members.length > 0)) {
    const group = document.createElement("optgroup");
    group.label = label;
    group.append(...members.map((model) => new Option(model.id, model.id)));
    picker.append(group);
  }
  if (models.length === 0) picker.append(new Option(t("model_none"), ""));
}

/** What the reader should know: the server's own words and code, or the page's words for a fault without any. */
function describe(error) {
  if (!(error instanceof ApiError)) {
    console.error(error); // a fault of this page, not of the server
    return String(error);
  }
  const code = error.code ? ` (${error.code})` : "";
  const wait = error.retryAfter === null ? "" : ` ${t("retry_after", { seconds: error.retryAfter })}`;
  return `${error.kind ? t(error.kind) : error.message}${code}${wait}`;
}

/** Run `action`; for as long as the server answers 401 and the reader gives another key, run it again. */
async function withKey(action) {
  for (;;) {
    try {
      return await action();
    } catch (error) {
      if (error.status !== 401 || !(await askForKey(error.message))) throw error;
    }
  }
}

function askForKey(reason) {
  const dialog = $("key-dialog");
  $("key").value = "";
  $("key-error").textContent = reason;
  dialog.returnValue = "";
  dialog.showModal();
  $("key-cancel").onclick = () => dialog.close("");
  $("key-form").onsubmit = () => {
    setKey($("key").value);
    dialog.returnValue = "given";
  };
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "given"), { once: true });
  });
}

start();
