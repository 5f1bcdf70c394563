"""Text without tensors: dialogue templates, segments of a prompt, the rows that the LLM reads, and their preview."""
