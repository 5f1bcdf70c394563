"""The datasets of MiniGPT-v2: official annotation files -> records -> an instruction, an answer and mostly an image.

records.py    what an annotation says of one image, and the loop over the rows of a file
readers.py    captions, questions, grounded phrases, plain instructions: one function a format
dialogues.py  LLaVA's conversations
regions.py    boxes: RefCOCO's pickles, Visual Genome
pools.py      the sentences around an annotation's own words: prompts/instructions_*.txt
dataset.py    a record -> the sample that the model reads
"""
