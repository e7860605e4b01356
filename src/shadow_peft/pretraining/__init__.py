"""Pretraining a shadow: make it for a base, train it on text by next-token loss or by distillation, as a model of its own.

shadows       a shadow made of layers of the base, or a small model beside it
corpus        a corpus as a stream of blocks of tokens
student       what is trained: the shadow alone, its loss, and the base as its teacher
teacher_cache what the base teaches, kept on disk
trainer       the training, and the finished model
report        loss curve and model card
"""
