"""A small service that samples digits: `service.py` is the HTTP, `worker.py` the queue and the batches, `load.py` the
load test.

python -m examples.serve.service            # http://127.0.0.1:8000, once everything is compiled
curl -N 127.0.0.1:8000/samples -d '{"label": 3, "previews": 10}' -H 'Content-Type: application/json'
python -m examples.serve.load               # beside plain torch.compile: a table
"""
