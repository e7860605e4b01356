"""The shadow answers, and the attached model where the shadow is unsure; the threshold keeps a promise.

python examples/cascade.py
"""

from transformers import AutoModelForCausalLM, AutoTokenizer

from shadow_peft import ShadowCascade, ShadowConfig, ShadowForCausalLM, get_shadow_model
from shadow_peft.demo.embedded import BASE_PATH  # a small base that comes with the package

base = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig())).eval()
cascade = ShadowCascade(model, tokenizer, max_new_tokens=8, do_sample=False)

# Rows that the adapter was not trained on. An untrained adapter is seldom right, so this example promises a share of
# escalations: with a confidence of 95 %, the attached model is asked for at most 40 % of the answers.
rows = [{"prompt": f"{i} plus {i} is", "completion": str(2 * i)} for i in range(100)]
calibration = cascade.calibrate(rows, 0.4, promise="escalations", confidence=0.95)
report = calibration.report
print(f"asks for {report['escalated']:.0%} of the answers, by the signal {calibration.scorer.signal}")

for answer in cascade.answers(["1 plus 1 is", "a much longer question"]):
    print(f"{answer.answered_by}, confidence {answer.confidence:.3f}: {answer.text!r}")

# On a device without the base, the exported shadow asks an OpenAI-compatible endpoint:
#   cascade.save_calibration("shadow")        beside what model.export_shadow().save_pretrained("shadow") wrote
#   remote = RemoteModel("big", "http://server:8000/v1", timeout=5)
#   ShadowCascade.from_pretrained("shadow", remote=remote).answer("1 plus 1 is")
