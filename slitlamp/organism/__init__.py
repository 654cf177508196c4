"""The embedded vision-language model: procedural scenes, language, architecture and training recipe."""
