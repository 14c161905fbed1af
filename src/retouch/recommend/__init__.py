"""Let a language model's knowledge of the world help a generative recommender, and never harm it.

A generative recommender writes the next item as a short word of codes, one code at a time. It knows who took what with
what; it does not know what the things are. A language model does. Each user asks it in a way of their own: a few soft
instructions, chosen from codebooks by the user's state, stand beside the titles of the user's items, and the model's
states over them are the user's knowledge. It is fused into the first input of the recommender's decoder and nowhere
else, so all of the language model's work for one user shrinks to one vector, computed nearline and looked up online.

Some knowledge hurts. So the recommender with knowledge is trained under a constraint: on what the user took next it
must not be less sure than the frozen recommender without knowledge. A multiplier enforces this while training, a
certificate on held-out users proves it afterwards, and where the proof fails the reference serves.

The method is LWGR (arXiv 2605.18771). Its authors published no code; what the paper does not say is decided here and
marked so in the docs.
"""
