"""An OpenAI-compatible server of one base with many adapters, on the server of transformers.

request -> guard -> handlers -> manager -> batcher -> decoding -> text

routes     the models that a request may name: the base, an adapter, a detached shadow, a cascade
guard      what no request may exceed before it is read: API key, size of the body; and who has hung up
handlers   transformers' handlers of completions, chat and responses, with checks of what they are sent
manager    one request: its limits, its deadline, and the way of its text back to the client
batcher    the queue: requests that wait together become one batch
decoding   one `generate` of rows with adapters, ends, sampling and seeds of their own
row_text   tokens of one row -> text, up to a stop string
cascading  batches that a cascade answers
metrics    what Prometheus is told
app        all of it together, and the process that serves it
"""
