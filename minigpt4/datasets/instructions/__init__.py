"""The datasets of MiniGPT-v2: official annotation files -> records -> samples: instruction, answer, mostly an image.

records.py    the common form of a record, and the loop over the rows of a file
readers.py    captions, questions, grounded phrases, text-only instructions: one function per format
dialogues.py  LLaVA's conversations
regions.py    boxes: RefCOCO's pickles, Visual Genome
pools.py      instruction templates around an annotation's own words: prompts/instructions_*.txt
dataset.py    from a record to a sample for the model
"""
