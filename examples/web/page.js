// The page: what is typed goes to the worker, what it says is shown. ?bundle=ADDRESS/ names the bundle's folder.
import { drawCurve } from "./curve.js";

const folder = new URL(new URLSearchParams(location.search).get("bundle") ?? "bundle/", location.href);
const element = (id) => document.getElementById(id);
const [adapter, chat, prompt, send, train] = ["adapter", "chat", "prompt", "send", "train"].map(element);
const MIB = 2 ** 20;
const name = folder.pathname.split("/").filter(Boolean).at(-1);

const worker = new Worker("worker.js", { type: "module" });
const waiting = new Map();
let onText = () => {};
let onStep = () => {};
worker.addEventListener("message", ({ data }) => {
  if ("progress" in data) element("progress").value = data.progress;
  else if ("text" in data) onText(data.text);
  else if ("step" in data) onStep(data.step);
  else {
    const { resolve, reject } = waiting.get(data.id);
    waiting.delete(data.id);
    if ("error" in data) return reject(new Error(data.error));
    element("memory").textContent = `${Math.round(data.result.memoryBytes / MIB)} MiB`;
    resolve(data.result);
  }
});
worker.addEventListener("error", () => show("error", "The worker could not start. Run `npm ci` in the page's folder."));

/** The result of a method of the worker. */
function call(method, argument) {
  return new Promise((resolve, reject) => {
    const id = crypto.randomUUID();
    waiting.set(id, { resolve, reject });
    worker.postMessage({ id, method, argument });
  });
}

/** A message at the end of the chat; gives the element that holds its text. */
function show(kind, text) {
  const message = document.createElement("article");
  message.className = kind;
  message.append(Object.assign(document.createElement("p"), { textContent: text }));
  chat.append(message);
  message.scrollIntoView({ block: "end" });
  return message.firstChild;
}

let isChat = false; // whether the bundle has a chat template
let messages = [];
let busy = null; // what the worker is at: the button that stops it, or the list of adapters

function restart() {
  messages = [];
  if (chat.lastChild?.className === "divider") chat.lastChild.remove(); // nothing was said under it
  show("divider", adapter.value ? `Adapter: ${adapter.value}` : "Base, no adapter");
}

async function answer(text) {
  show("user", text);
  messages.push({ role: "user", content: text });
  const shown = show("assistant", "");
  shown.classList.add("writing");
  onText = (piece) => {
    shown.textContent += piece;
    shown.scrollIntoView({ block: "end" });
  };
  try {
    const { tokenIds, timeToFirstTokenMs, tokensPerSecond } = await call("answer", isChat ? messages : text);
    messages.push({ role: "assistant", content: shown.textContent });
    element("first").textContent = `${Math.round(timeToFirstTokenMs)} ms`;
    if (tokensPerSecond) element("speed").textContent = `${tokensPerSecond.toPrecision(3)} tokens/s`;
    const count = `${tokenIds.length} token${tokenIds.length === 1 ? "" : "s"}`;
    shown.after(Object.assign(document.createElement("small"), { textContent: count }));
  } catch (error) {
    show("error", `${error.message}. The chat starts again.`); // most likely it outgrew the context
    restart();
  }
  shown.classList.remove("writing");
}

function setBusy(by) {
  busy = by;
  send.textContent = by === send ? "Stop" : "Send";
  train.textContent = by === train ? "Stop" : "Train";
  for (const button of [send, train]) button.disabled = by !== null && by !== button;
  for (const id of ["adapter", "clear"]) element(id).disabled = by !== null;
}

element("composer").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (busy) return call("stop");
  const text = prompt.value.trim();
  if (!text) return;
  prompt.value = "";
  setBusy(send);
  await answer(text);
  setBusy(null);
  prompt.focus();
});

prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!busy) element("composer").requestSubmit();
});

adapter.addEventListener("change", async () => {
  setBusy(adapter);
  try {
    await call("useAdapter", adapter.value || null);
    restart();
  } catch (error) {
    show("error", error.message);
  }
  setBusy(null);
});

async function personalize() {
  const [file] = element("rows").files;
  const maxSteps = element("steps").valueAsNumber;
  const losses = [];
  element("curve").toggleAttribute("hidden", false);
  element("trained").textContent = "Reading the rows; a tenth is held out to judge by.";
  onStep = ({ step, loss }) => {
    losses.push(loss);
    drawCurve(element("curve"), losses, maxSteps);
    element("trained").textContent = `Step ${step} of ${maxSteps}: loss ${loss.toFixed(3)}.`;
  };
  const learningRate = element("rate").valueAsNumber;
  const text = await file.text();
  const { name, isUsed, file: made, before, after } = await call("personalize", { text, maxSteps, learningRate });
  adapter.append(new Option(name));
  if (isUsed) adapter.value = name;
  const judged = `On held-out rows ${before.toFixed(5)} before, ${after.toFixed(5)} now.`;
  const chosen = isUsed ? `${name} is used now.` : `Choose ${name} to try it all the same.`;
  element("trained").textContent += ` ${Number.isNaN(before) ? "" : judged} ${chosen}`;
  URL.revokeObjectURL(element("download").href);
  element("download").href = URL.createObjectURL(new Blob([made]));
  element("download").download = `${name}.safetensors`;
  element("download").hidden = false;
  restart();
}

element("training").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (busy) return call("stop");
  setBusy(train);
  try {
    await personalize();
  } catch (error) {
    element("trained").textContent = `Not trained: ${error.message}.`;
  }
  setBusy(null);
});

element("personalize").addEventListener("dragover", (event) => event.preventDefault());
element("personalize").addEventListener("drop", (event) => {
  event.preventDefault();
  element("rows").files = event.dataTransfer.files;
});

element("clear").addEventListener("click", () => {
  chat.replaceChildren();
  restart();
});

async function start() {
  element("bundle").textContent = `loading ${name}`;
  const opened = await call("open", folder.href);
  isChat = opened.chat;
  element("bundle").textContent = `${name} · ${opened.weights} weights, ${(opened.nbytes / MIB).toFixed(1)} MiB`;
  element("load").textContent = `${(opened.loadMs / 1e3).toFixed(1)} s`;
  adapter.append(new Option("none (base)", ""), ...opened.adapters.map((each) => new Option(each)));
  adapter.value = opened.adapter ?? "";
  if (!isChat) prompt.placeholder = "Begin a text";
  element("personalize").hidden = !opened.trains;
  for (const id of ["prompt", "send"]) element(id).disabled = false;
  setBusy(null);
  restart();
  prompt.focus();
}

start()
  .catch((error) => {
    element("bundle").textContent = `${name} could not be loaded`;
    show("error", error.message);
  })
  .finally(() => (element("progress").hidden = true));
