"""Can other libraries run a model of this project?

    python docs/lab/export.py out/ppo.pt DIR

writes it as transformers and llama.cpp's converter read GPT-2. Found: the same text gives the same
ids, the same ids the same logits, and `load_gpt` reads DIR again, its world's seed included.
"""
import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import model as m

CHAT = ("{% for m in messages %}{{ '<|' + m.role + '|> ' + m.content.strip() + "
        "('<|endoftext|>' if m.role == 'assistant' else '') }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}")

def spell_out(tokenizer):
    """-> {token as GPT-2's files spell it: id}, and the merges in the order in which they apply."""
    # a byte is one visible character: its own in Latin-1, or else the next from 256 on
    hidden = [*range(33), *range(127, 161), 173]           # not visible themselves
    letters = {byte: 256 + i for i, byte in enumerate(hidden)}
    ids, merges = tokenizer.encoding._mergeable_ranks, []
    spelled = {t: t.decode("latin-1").translate(letters) for t in sorted(ids, key=ids.get)}
    # tiktoken merges any two neighbours that make a token, the lowest id first; the files have to
    # list every such pair, in that order: for "the", both ["t", "he"] and ["th", "e"]
    for token in spelled:
        for i in range(1, len(token)):
            if token[:i] in spelled and token[i:] in spelled:
                merges.append([spelled[token[:i]], spelled[token[i:]]])
    return {spelled[token]: i for token, i in ids.items()}, merges

def tokenizer_files(tokenizer, context):
    """-> {file name: contents}. Where a text has "<|user|>" in it, they make it the special token,
    as ours never does; transformers then wants split_special_tokens=True."""
    vocab, merges = spell_out(tokenizer)
    off = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    special = [{"id": i, "content": name, "special": True, **off}
               for name, i in tokenizer.encoding._special_tokens.items()]
    split = {"type": "Split", "pattern": {"Regex": tokenizer.encoding._pat_str},
             "behavior": "Isolated", "invert": False}      # into words; then these into bytes
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                "use_regex": False}
    before = {"type": "Sequence", "pretokenizers": [split, to_bytes]}
    bpe = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": True}  # whole words
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context,
              "clean_up_tokenization_spaces": False, "chat_template": CHAT,
              "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    return {"tokenizer.json": {"version": "1.0", "added_tokens": special, "pre_tokenizer": before,
                               "model": bpe, "decoder": to_bytes}, "tokenizer_config.json": config}

def write_weights(model, path):
    """model.safetensors: the length of a header, 8 bytes; the header, JSON; then the numbers."""
    header, weights, end = {"__metadata__": {"format": "pt"}}, [], 0
    for name, weight in model.state_dict().items():
        if weight.dim() == 2 and name.startswith("blocks."):
            weight = weight.T              # nn.Linear keeps it as (out, in), GPT-2 as (in, out)
        weights.append(weight.float().contiguous())
        for ours, theirs in m.GPT2_PARTS.items():
            name = name.replace(ours, theirs)
        start, end = end, end + weights[-1].nbytes
        header[f"transformer.{name}"] = {"dtype": "F32", "shape": [*weights[-1].shape],
                                         "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)        # readers map the numbers into memory: aligned, then
    with open(f"{path}.tmp", "wb") as file:
        file.writelines([len(text).to_bytes(8, "little"), text, *(w.numpy() for w in weights)])
    os.replace(f"{path}.tmp", path)

def main(argv=None):
    p = argparse.ArgumentParser(description="Write a checkpoint as transformers reads it.")
    p.add_argument("checkpoint", help="out/ppo.pt, ...")
    p.add_argument("folder", metavar="DIR", type=m.writable, help="where the four files go")
    args = p.parse_args(argv)
    # a shard left beside the new weights would be read in place of them
    others = {path.name for path in Path(args.folder).glob("model*.safetensors*")}
    others -= {"model.safetensors", "model.safetensors.tmp"}           # those are ours
    if others:
        raise SystemExit(f"{args.folder} holds weights of another model: remove "
                         f"{', '.join(sorted(others))} or name another folder")
    model = m.load_gpt(args.checkpoint, device=m.pick_device("cpu"))
    eot, sizes = model.tokenizer.eot, dict(zip(m.GPT2_SIZES, vars(model.config).values()))
    config = {**m.GPT2_KIND, **sizes, "activation_function": m.GELUS[model.config.gelu],
              "architectures": ["GPT2LMHeadModel"], "bos_token_id": eot, "eos_token_id": eot,
              "pad_token_id": model.tokenizer.pad,
              "n_ctx": sizes["n_positions"], "world_seed": model.world_seed,
              "tokenizer": model.tokenizer.state()}        # these two for load_gpt
    files = {"config.json": config, **tokenizer_files(model.tokenizer, model.config.context)}
    for name, contents in files.items():
        text = json.dumps(contents, ensure_ascii=False, indent=1)
        Path(args.folder, name).write_text(text, encoding="utf-8")
    write_weights(model, Path(args.folder, "model.safetensors"))
    print(f"wrote {args.folder}; next: AutoModelForCausalLM.from_pretrained({args.folder!r})")

if __name__ == "__main__":
    main()
