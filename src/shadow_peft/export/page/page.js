const element = (id) => document.getElementById(id);
const [form, text, go, stop, status, output, by, speed] =
  ["form", "text", "go", "stop", "status", "answer", "by", "speed"].map(element);
const source = URL.createObjectURL(new Blob([element("worker-source").textContent], { type: "text/javascript" }));

let worker, waiting, ready, asking, count = 0;

// Ask the worker; `shown` gets pieces of text while it works.
function ask(request, shown) {
  return new Promise((resolve, reject) => {
    const task = ++count;
    waiting.set(task, { resolve, reject, shown });
    worker.postMessage({ ...request, task });
  });
}

function start() {
  waiting = new Map();
  worker = new Worker(source);
  worker.onmessage = ({ data: { task, piece, result, error } }) => {
    const one = waiting.get(task);
    if (piece !== undefined) return one.shown?.(piece);
    waiting.delete(task);
    return error === undefined ? one.resolve(result) : one.reject(new Error(error));
  };
  worker.onerror = (event) => waiting.forEach((one) => one.reject(new Error(event.message || "the worker cannot start")));
  const parts = Object.fromEntries([...document.querySelectorAll("script[data-part]")].map((one) => [one.dataset.part, one.textContent]));
  const begun = performance.now();
  ready = ask({ kind: "load", parts }).then(() => {
    go.disabled = false;
    status.textContent = `Ready after ${((performance.now() - begun) / 1000).toFixed(1)} s.`;
  });
  ready.catch((error) => { status.textContent = `This browser cannot run the model: ${error.message}`; });
}

function busy(is) {
  go.disabled = is;
  stop.hidden = !is;
  output.setAttribute("aria-busy", String(is));
}

function answered(who, said) {
  by.dataset.who = who;
  by.textContent = said;
}

// Where the shadow is unsure of its answer, the server's takes its place, or goes on where it got unsure.
async function escalate(prompt, { tokens, trace }) {
  const { place, confidence } = decide(SETTINGS.ask, trace);
  const { model, origin, timeout } = SETTINGS.ask;
  const stated = `confidence ${confidence.toFixed(2)}`;
  if (place === null) return answered("shadow", `The shadow in this page answered (${stated}).`);
  if (!element("ask").checked) return answered("shadow", `The shadow in this page answered. It is unsure (${stated}), and asking is switched off.`);
  status.textContent = `The shadow is unsure. Asking ${model} at ${origin}, for up to ${timeout} s …`;
  asking = new AbortController();
  try {
    const own = place > 0 ? await ask({ kind: "text", tokens: tokens.slice(0, place) }) : "";
    output.textContent = own + await askServer(SETTINGS.ask, prompt + own, SETTINGS.tokens - place, asking.signal);
    const begun = place > 0 ? "began, and got unsure" : "was unsure";
    answered("server", `${model} at ${origin} answered. The shadow ${begun} (${stated}).`);
  } catch (error) {
    answered("failed", `${model} at ${origin} did not answer (${error.message}). This is the shadow's answer, of which it is unsure (${stated}).`);
  }
  asking = undefined;
}

async function respond() {
  if (go.disabled || !text.value.trim()) return;
  busy(true);
  output.textContent = by.textContent = speed.textContent = "";
  status.textContent = "Answering …";
  try {
    const prompt = SETTINGS.prompt.replace("{}", () => text.value.trim());
    const result = await ask({ kind: "answer", text: prompt, tokens: SETTINGS.tokens, traced: Boolean(SETTINGS.ask) }, (piece) => { output.textContent += piece; });
    const rate = result.tokens.length / result.seconds;
    speed.textContent = `${SETTINGS.ask ? "The shadow: " : ""}${result.tokens.length} tokens in ${result.seconds.toFixed(2)} s: ${rate.toFixed(0)} tokens per second, prompt included.`;
    if (SETTINGS.ask) await escalate(prompt, result);
    status.textContent = "Ready.";
  } catch (error) {
    status.textContent = `No answer: ${error.message}`;
  }
  busy(false);
}

form.addEventListener("submit", (event) => { event.preventDefault(); respond(); });
text.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  respond();
});
stop.addEventListener("click", () => {
  if (asking) return asking.abort();
  worker.terminate();
  waiting.forEach((one) => one.reject(new Error("stopped.")));
  start();
  ready.then(() => text.focus());
});
for (const button of document.querySelectorAll(".examples button")) {
  button.addEventListener("click", () => { text.value = button.textContent; respond(); });
}
start();

// For those who drive the page from a program.
window.shadow = {
  settings: SETTINGS,
  ready: () => ready,
  split: (typed) => ask({ kind: "split", text: typed }),
  decide: (ids, tokens, policy) => ask({ kind: "answer", ids, tokens, traced: true }).then(({ trace }) => decide(policy, trace)),
  askServer: (policy, prompt, tokens) => askServer(policy, prompt, tokens, new AbortController().signal),
  answer: (ids, tokens) => ask({ kind: "answer", ids, tokens }).then((result) => result.tokens),
};
