"""Run the export that the arguments of minigpt4/export.py ask for."""

from argparse import Namespace
from pathlib import Path

from minigpt4.exporting.back import import_hf, is_export
from minigpt4.exporting.hf import export_gguf, export_hf
from minigpt4.exporting.opening import open_config, open_skeleton, write_checkpoint


def export(args: Namespace) -> None:
    """Write what --to asks for; `args` are those of minigpt4/export.py.

    Raises ValueError (CheckpointError, ConfigError) or OSError if the checkpoint cannot be read, the format cannot
    represent the model, or the output cannot be written.
    """
    kind, folder = args.to[0], Path(args.to[1])
    # An export is given: recover its checkpoint.
    if is_export(args.checkpoint):
        if kind != "checkpoint":
            raise ValueError(
                f"CHECKPOINT: '{args.checkpoint}' is an export already; give its checkpoint"
            )
        unused = {"--cfg-path": args.cfg_path, "--options": args.options, "--license": args.license}
        if given := ", ".join(option for option in unused if unused[option]):
            raise ValueError(
                f"{given}: '{args.checkpoint}' is an export, which gives its checkpoint as it was; leave this out"
            )
        import_hf(Path(args.checkpoint), folder)
        print(f"'{folder}' has the weights of '{args.checkpoint}', bit for bit")
        return
    # A checkpoint is given: export it.
    cfg = open_config(args.checkpoint, args.cfg_path, args.options or ())
    if kind == "hf":
        class_name = export_hf(cfg, folder, args.license)
        print(f"'{folder}' is a {class_name} of transformers: transformers serve {folder}")
        return
    if kind == "gguf":
        path = export_gguf(cfg, folder, args.license)
        options = f"--mmproj {path} --jinja --chat-template-file {folder / 'chat_template.jinja'}"
        print(
            f"'{path}' goes with any GGUF of the LLM: llama-server -m LLM.gguf {options}; what a request has to put "
            "around an image: docs/serving.md"
        )
        return
    model, saved = open_skeleton(cfg)
    write_checkpoint(cfg, model, saved, folder, args.license)
    print(f"'{folder}' is opened by its path: python demo.py --checkpoint {folder}")
