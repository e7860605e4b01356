const element = (id) => document.getElementById(id);
const [form, text, go, stop, status, output, speed] =
  ["form", "text", "go", "stop", "status", "answer", "speed"].map(element);
const source = URL.createObjectURL(new Blob([element("worker-source").textContent], { type: "text/javascript" }));

let worker, waiting, ready, count = 0;

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

async function respond() {
  if (go.disabled || !text.value.trim()) return;
  busy(true);
  output.textContent = speed.textContent = "";
  status.textContent = "Answering …";
  try {
    const prompt = SETTINGS.prompt.replace("{}", () => text.value.trim());
    const result = await ask({ kind: "answer", text: prompt, tokens: SETTINGS.tokens }, (piece) => { output.textContent += piece; });
    const rate = result.tokens.length / result.seconds;
    speed.textContent = `${result.tokens.length} tokens in ${result.seconds.toFixed(2)} s: ${rate.toFixed(0)} tokens per second, prompt included.`;
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
  ready: () => ready,
  split: (typed) => ask({ kind: "split", text: typed }),
  answer: (ids, tokens) => ask({ kind: "answer", ids, tokens }).then((result) => result.tokens),
};
