// Runs the model away from the page, so that the page stays responsive while it answers.

let tokenizer, model, transformers;

// A part of the page: base64 of gzip -> a Response.
function unpacked(text, type) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream, { headers: { "content-type": type } });
}

const moduleUrl = (source) => URL.createObjectURL(new Blob([source], { type: "text/javascript" }));

async function load(parts) {
  const runtime = moduleUrl(await unpacked(parts.runtime, "text/javascript").text());
  let source = await unpacked(parts.transformers, "text/javascript").text();
  for (const name of ["onnxruntime-web/webgpu", "onnxruntime-common"]) {
    source = source.replaceAll(`from"${name}"`, `from"${runtime}"`);
  }
  transformers = await import(moduleUrl(source));
  const { env, AutoTokenizer, AutoModelForCausalLM } = transformers;
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.useBrowserCache = false;
  env.localModelPath = "parts/";
  env.fetch = async (url) => {
    const text = parts[String(url).split("/").pop()];
    return text === undefined ? new Response("", { status: 404 }) : unpacked(text, "application/octet-stream");
  };
  env.useWasmCache = false;
  const { wasm } = env.backends.onnx;
  wasm.numThreads = 1;
  wasm.wasmPaths = { mjs: moduleUrl(await unpacked(parts.glue, "text/javascript").text()) };
  wasm.wasmBinary = await unpacked(parts.wasm, "application/wasm").arrayBuffer();
  tokenizer = await AutoTokenizer.from_pretrained("model");
  model = await AutoModelForCausalLM.from_pretrained("model", { dtype: "fp32", device: "wasm", subfolder: "" });
}

const numbers = (tensor) => [...tensor.data].map(Number);
const split = (text, special) => numbers(tokenizer(text, { add_special_tokens: special }).input_ids);

// Probability of the likeliest token, its margin over the second, and one minus the entropy in units of the uniform one's.
function stepConfidence(scores) {
  let [first, second] = [-Infinity, -Infinity];
  for (const score of scores) {
    if (score > first) [first, second] = [score, first];
    else if (score > second) second = score;
  }
  let [sum, weighted] = [0, 0];
  for (const score of scores) {
    const weight = Math.exp(score - first);
    sum += weight;
    if (weight > 0) weighted += weight * (score - first);
  }
  const certainty = 1 - (Math.log(sum) - weighted / sum) / Math.log(scores.length);
  return [1 / sum, (1 - Math.exp(second - first)) / sum, Math.min(1, Math.max(0, certainty))];
}

// Logits processors that change nothing and record the confidence in each token.
function recording(trace) {
  class Recorder extends transformers.LogitsProcessor {
    _call(ids, logits) {
      trace.push(stepConfidence(logits.data));
      return logits;
    }
  }
  const processors = new transformers.LogitsProcessorList();
  processors.push(new Recorder());
  return processors;
}

// Greedy answer to token ids; `shown` is called with each piece of text, a `trace` gets the confidence in each token.
async function answer(ids, tokens, shown, trace) {
  const { Tensor, TextStreamer } = transformers;
  const shape = [1, ids.length];
  const streamer = new TextStreamer(tokenizer, { skip_prompt: true, skip_special_tokens: true, callback_function: shown });
  const output = await model.generate({
    input_ids: new Tensor("int64", BigInt64Array.from(ids, BigInt), shape),
    attention_mask: new Tensor("int64", new BigInt64Array(ids.length).fill(1n), shape),
    max_new_tokens: tokens, do_sample: false, streamer,
    logits_processor: trace ? recording(trace) : null,
  });
  return numbers(output).slice(ids.length);
}

const tasks = {
  load: ({ parts }) => load(parts),
  split: ({ text }) => split(text, false),
  text: ({ tokens }) => tokenizer.decode(tokens, { skip_special_tokens: true }),
  async answer({ text, ids, tokens, traced, task }) {
    const prompt = ids ?? split(text, true);
    const trace = traced ? [] : undefined;
    const begun = performance.now();
    const found = await answer(prompt, tokens, (piece) => postMessage({ task, piece }), trace);
    return { tokens: found, trace, seconds: (performance.now() - begun) / 1000 };
  },
};

onmessage = async ({ data }) => {
  try {
    postMessage({ task: data.task, result: await tasks[data.kind](data) });
  } catch (error) {
    postMessage({ task: data.task, error: String(error?.message ?? error) });
  }
};
