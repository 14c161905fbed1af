"""Fuse adapters that private sites have trained into one, and prove what the fused model can and cannot do.

A cloud holds a model that its edges cannot hold. It prunes the model for each class of edge and ships the pruned
weights; each edge trains a LoRA adapter on its own data and sends back the adapter alone; the cloud recovers every
adapter to the full model's shape, resolves conflicts among them and fuses them into one. Pruning cuts only neurons and
groups of heads, never the width of the residual stream, so recovering is a scatter and loses nothing.

All fusion is exact in low rank: adapters of any ranks are joined by their factors, and methods that look at the
spectrum work in the small core that the adapters span. Whether a fused model still answers when one prompt mixes
questions of several domains is asked by composed suites, and its loss on each domain is bounded on held-out questions
before it is kept.

The system follows arXiv 2605.23913, of which only the abstract is public: LoRA-CR and MMLU-CD are reconstructed from it.
"""
