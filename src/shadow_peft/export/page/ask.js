// An OpenAI-compatible endpoint, asked for what follows a text; within the time limit there is an answer or an error.

async function askServer({ url, model, timeout }, prompt, tokens, stopped) {
  const signal = AbortSignal.any([AbortSignal.timeout(timeout * 1000), stopped]);
  try {
    const response = await fetch(`${url.replace(/\/+$/, "")}/completions`, {
      method: "POST", signal, credentials: "omit", redirect: "error", referrerPolicy: "no-referrer",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model, prompt, max_tokens: tokens, temperature: 0, stream: false }),
    });
    if (!response.ok) throw new Error(`status ${response.status}`);
    const found = (await response.json()).choices?.[0]?.text;
    if (typeof found !== "string") throw new Error("what it sent is no answer");
    return found;
  } catch (error) {
    throw new Error(failure(error, timeout), { cause: error });
  }
}

function failure(error, timeout) {
  if (error.name === "TimeoutError") return `no answer within ${timeout} s`;
  if (error.name === "AbortError") return "stopped";
  if (error.name === "SyntaxError") return "what it sent is no answer";
  return error.name === "TypeError" ? "it cannot be reached, or does not let this page ask" : error.message;
}

