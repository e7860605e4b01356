// How sure the shadow is of an answer, and whether that is enough: `cascade/signals.py`, `scorer.py` and `answers.py`.
// A trace has [probability, margin, certainty] for each token.

const SMALLEST = 1e-6;
const OF_TOKENS = { min_probability: 0, min_margin: 1, certainty: 2 };
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const least = (values) => values.reduce((low, value) => Math.min(low, value), 1);

function signals(trace) {
  const [probabilities, margins, certainties] = [0, 1, 2].map((column) => trace.map((values) => values[column]));
  return {
    min_probability: least(probabilities), mean_probability: Math.exp(mean(probabilities.map(Math.log))),
    min_margin: least(margins), mean_margin: mean(margins),
    certainty: least(certainties), mean_certainty: mean(certainties), length: trace.length,
  };
}

function headSignal({ weights, bias }, found) {
  const surprise = (probability) => -Math.log(Math.max(probability, SMALLEST));
  const features = [
    surprise(found.min_probability), surprise(found.mean_probability), found.min_margin, found.mean_margin,
    found.certainty, found.mean_certainty, Math.log(found.length),
  ];
  return 1 / (1 + Math.exp(-features.reduce((sum, value, index) => sum + weights[index] * value, bias)));
}

// The curve through the knots, constant beyond them.
function level(value, { knots, levels }) {
  const right = knots.findIndex((knot) => value <= knot);
  if (right === 0) return levels[0];
  if (right < 0) return levels.at(-1);
  const part = (value - knots[right - 1]) / (knots[right] - knots[right - 1]);
  return levels[right - 1] + part * (levels[right] - levels[right - 1]);
}

// The token from which the other model is to write, or null, and the confidence that decided it.
function decide({ scorer, threshold, takeover }, trace) {
  const found = signals(trace);
  const raw = scorer.signal === "head" ? headSignal(scorer.head, found) : found[scorer.signal];
  const whole = level(raw, scorer);
  if (takeover === "answer") return { place: whole < threshold ? 0 : null, confidence: whole };
  const confidences = trace.map((values) => level(values[OF_TOKENS[scorer.signal]], scorer));
  const place = confidences.findIndex((confidence) => confidence < threshold);
  return place < 0 ? { place: null, confidence: whole } : { place, confidence: confidences[place] };
}

