"""The folders that a student is loaded from, and the one that it is saved as.

What a late-interaction model is, libraries agree on: an encoder, a projection without bias, L2 normalisation. They write it
down in three ways:

    colbert-ai             model.safetensors or pytorch_model.bin: the encoder as `bert.*`, and `linear.weight` [E, hidden]
                           artifact.metadata (JSON): query_maxlen, doc_maxlen, query_token_id, mask_punctuation, ...
    PyLate                 modules.json: a Transformer, here, and a Dense in 1_Dense/, which has its own `linear.weight`
                           config_sentence_transformers.json: query_prefix, query_length, do_query_expansion, ...
    sentence-transformers  modules.json: Transformer, Dense, MultiVectorMask, Normalize (its MultiVectorEncoder, since 6.0)
                           sentence_bert_config.json: lengths, expansion; 2_MultiVectorMask/: punctuation; prompts: markers

and a model of single vectors in one: sentence-transformers' Transformer, Pooling and perhaps Dense. `save` writes one folder
that all of them open: colbert-ai's files, PyLate's beside them (sentence-transformers reads these too), and our settings.

By the same words they mean the same. A length counts all tokens: marker, [CLS] and [SEP] too. A marker follows [CLS]: ColBERT
and PyLate insert its id there, sentence-transformers writes it before the text as a token. [MASK]s that fill a query score,
and unless `attend_to_masks` nobody attends to them. But colbert-ai always marks and always expands, whatever a folder says.

Nothing is guessed: a tensor that is missing, a module or a switch that Student has not, raises ValueError in one sentence.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import math
import string
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

METADATA, OURS = "artifact.metadata", "pairdistill.json"  # ColBERT's settings file, and ours for what it has no word for
SETTINGS = {"architecture", "dim", "query_length", "passage_length", "query_expansion", "markers", "pooling", "skiplist",
            "attend_to_masks", "base_model"}
AGAIN = "fetch it or save it again"


# Reading ------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def loading(name: str, errors=Exception):
    """What transformers raises for what it cannot load, which can be anything, as a ValueError in one sentence."""
    try:
        yield
    except errors as e:
        raise ValueError(cannot_load(name, e)) from e


def load_model(auto, name: str, optional=lambda key, prefix: False, **options):
    """auto.from_pretrained(name) -> the model, and which tensors the checkpoint lacks, as transformers has drawn them at
    random: only those that are `optional` by their names, an encoder's with a head before it. Raises ValueError."""
    with loading(name):
        model, info = auto.from_pretrained(name, output_loading_info=True, trust_remote_code=False, **options)
    lacking = sorted(info["missing_keys"])
    if others := [k for k in lacking if not optional(k, f"{model.base_model_prefix}.")]:
        raise ValueError(f"the weights in {name} lack {len(others)} of the model's tensors, such as {others[0]}: the file is "
                         f"incomplete, or its names have another prefix than {model.base_model_prefix!r}; {AGAIN}")
    return model, lacking


def load_encoder(name: str):
    """An encoder, every tensor of it from the checkpoint, and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer
    # A pooler has no part in a token embedding: without it there is nothing untrained to save.
    pooler = {"add_pooling_layer": False} if (_json(name, "config.json") or {}).get("model_type") == "bert" else {}
    with loading(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    # In float32, which config.json then says of what is saved: in half of it a student's small steps would be rounded away.
    encoder, missing = load_model(AutoModel, name, lambda key, _: key.startswith("pooler."), dtype=torch.float32, **pooler)
    if encoder.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder and a decoder, and a student is an encoder alone")
    if missing:
        encoder.pooler = None
    if None in (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id) or (
            len(tokenizer) <= len(tokenizer.all_special_tokens)):
        raise ValueError(f"{name} has no tokenizer with [CLS], [SEP], [MASK] and a vocabulary: add its tokenizer.json")
    rows = encoder.get_input_embeddings().num_embeddings
    if max(tokenizer.get_vocab().values()) >= rows:
        raise ValueError(f"the tokenizer in {name} has {len(tokenizer)} tokens and the encoder vectors for {rows}: "
                         f"they are not of one model; {AGAIN}")
    return encoder, tokenizer


def most_tokens(config) -> float:
    """How many tokens an encoder has positions for. RoBERTa's begin after those of its padding."""
    first = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    return getattr(config, "max_position_embeddings", math.inf) - first


def no_truncation(tokenizer) -> None:
    """Before it is saved: its truncation is whatever the last call asked for."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()


def read(name: str, architecture: str, tokenizer) -> tuple[dict, torch.Tensor | None]:
    """Student's settings, as far as the folder has any, and its projection [E, hidden]; ({}, None) for a plain encoder."""
    with loading(name, (KeyError, TypeError, AttributeError)):  # settings files of another form than is read here
        return _read(name, architecture, tokenizer)


def _read(name: str, architecture: str, tokenizer) -> tuple[dict, torch.Tensor | None]:
    ours, modules, metadata = _json(name, OURS), _json(name, "modules.json", list), _json(name, METADATA)
    if ours is not None and not {"architecture", "dim"} <= ours.keys() <= SETTINGS:
        raise ValueError(f"{name}/{OURS} has the settings {', '.join(ours)}, which are not those of a student; {AGAIN}")
    if modules is not None:
        settings, weight = _modules(name, modules, ours["architecture"] if ours else architecture, tokenizer)
    else:
        weight = _colbert_weight(name)
        settings = {} if weight is None else _colbert_settings(name, metadata or {})
    settings = ours or settings
    if architecture == "dpr" and settings.get("architecture") == "colbert":
        raise ValueError(f"{name} gives a vector a token: load it with architecture='colbert'")
    if ours and not ours["dim"]:
        return ours, None  # what was saved for the others is the identity
    if weight is None and (settings.get("dim") or (metadata is not None and modules is None)):
        raise ValueError(f"the weights in {name} have no linear.weight, and {OURS if ours else METADATA} speaks of a "
                         f"projection; {AGAIN}")
    if weight is not None and (weight.ndim != 2 or settings.get("dim", len(weight)) != len(weight)):
        raise ValueError(f"the projection in {name} has shape {list(weight.shape)}, and the settings there say "
                         f"[{settings.get('dim', 'E')}, hidden]; {AGAIN}")
    return settings | ({} if weight is None else {"dim": len(weight)}), weight


def _colbert_weight(name: str) -> torch.Tensor | None:
    for file in ("model.safetensors", "pytorch_model.bin"):
        index = _json(name, f"{file}.index.json")  # of a model in several files
        path = find(name, index["weight_map"].get("linear.weight", file) if index else file)
        if path:
            return _linear(path)
    return None


def _colbert_settings(name: str, metadata: dict) -> dict:
    m = {k: v for k, v in metadata.get("config", metadata).items() if v is not None}
    for key, ours in ("similarity", "cosine"), ("interaction", "colbert"):
        if m.get(key, ours) != ours:
            raise ValueError(f"{name}/{METADATA} says {key} {m[key]!r}; a student's is {ours!r}")
    names = {"dim": "dim", "query_maxlen": "query_length", "doc_maxlen": "passage_length",
             "attend_to_mask_tokens": "attend_to_masks"}
    return {ours: m[theirs] for theirs, ours in names.items() if theirs in m} | dict(
        architecture="colbert", query_expansion=True, markers=[m.get("query_token_id", "[unused0]"),
                                                               m.get("doc_token_id", "[unused1]")],
        skiplist=string.punctuation if m.get("mask_punctuation", True) else "")


def _modules(name: str, modules: list, architecture: str, tokenizer) -> tuple[dict, torch.Tensor | None]:
    """The layouts with a modules.json: PyLate's and sentence-transformers'."""
    kinds = {m["path"]: m["type"].rsplit(".", 1)[-1] for m in modules}
    if any(".." in Path(path).parts or Path(path).is_absolute() for path in kinds):
        raise ValueError(f"{name}/modules.json has a path that leaves the folder: {', '.join(kinds)}; {AGAIN}")
    if not set(kinds.values()) <= {"Transformer", "Pooling", "Dense", "MultiVectorMask", "Normalize"} or (
            kinds.get("") != "Transformer"):
        raise ValueError(f"{name}/modules.json lists {', '.join(m['type'] for m in modules)}; a student is a Transformer in "
                         f"the folder itself, then Dense, Pooling, MultiVectorMask or Normalize")
    config = _json(name, "config_sentence_transformers.json") or {}
    late = "Pooling" not in kinds.values()
    if not late:
        # As a start for ColBERT it is a plain encoder. Normalize is left out: DPR scores by the dot product.
        if architecture == "colbert":
            return {}, None
        path = next(path for path, kind in kinds.items() if kind == "Pooling")
        settings = dict(pooling=_pooling(f"{name}/{path}", _json(name, f"{path}/config.json") or {}))
        if limit := (_json(name, "sentence_bert_config.json") or {}).get("max_seq_length"):
            settings |= dict(query_length=limit, passage_length=limit)
    elif "MultiVectorMask" in kinds.values():
        settings = _multi_vector_settings(name, kinds, config, tokenizer)
    elif "Dense" in kinds.values():
        settings = _pylate_settings(config)
    else:
        return {}, None
    for prompt in (config.get("prompts") or {}).values():
        if prompt and prompt.strip() not in [m.strip() for m in settings.get("markers", [])]:
            raise ValueError(f"{name}/config_sentence_transformers.json has {prompt!r} written before texts, which a student "
                             f"does not do: write it into the texts yourself and remove it there")
    weight = None
    for path in (path for path, kind in kinds.items() if kind == "Dense"):  # linear after linear is linear
        weight = _dense(name, path) if weight is None else _dense(name, path) @ weight
    return settings | ({} if "Dense" in kinds.values() else {"dim": None}), weight


def _pylate_settings(config: dict) -> dict:
    c = {k: v for k, v in config.items() if v is not None}
    return dict(architecture="colbert", markers=[c.get("query_prefix", "[Q] "), c.get("document_prefix", "[D] ")],
                query_length=c.get("query_length", 32), passage_length=c.get("document_length", 180),
                query_expansion=c.get("do_query_expansion", True), skiplist=c.get("skiplist_words", string.punctuation),
                attend_to_masks=c.get("attend_to_expansion_tokens", False))


def _multi_vector_settings(name: str, kinds: dict, config: dict, tokenizer) -> dict:
    transformer = _json(name, "sentence_bert_config.json") or {}
    mask = _json(name, next(path for path, kind in kinds.items() if kind == "MultiVectorMask") + "/config.json") or {}
    limit = min(transformer.get("max_seq_length") or tokenizer.model_max_length,
                (_json(name, "config.json") or {}).get("max_position_embeddings", 512))
    expansion = transformer.get("query_expansion")
    if "Normalize" not in kinds.values():
        raise ValueError(f"{name}/modules.json has no Normalize, and a student's token vectors are normalised")
    if mask.get("skiplist_tasks", ["document"]) != ["document"] or mask.get("keep_only_token_ids"):
        raise ValueError(f"{name} leaves out tokens by its MultiVectorMask in a way that a student has not: only "
                         f"skiplist_words of documents can be")
    if expansion and (expansion["strategy"] != "fixed" or expansion.get("token") not in (None, tokenizer.mask_token)):
        raise ValueError(f"{name}/sentence_bert_config.json expands queries by {expansion}; a student fills them with [MASK]s "
                         f"up to a fixed length")
    # A word that is no token is left out of the list there. (ColBERT and PyLate would skip [UNK] for it.)
    skiplist = [word for word in mask.get("skiplist_words") or [] if word == tokenizer.unk_token or
                tokenizer.convert_tokens_to_ids(word) not in (None, tokenizer.unk_token_id)]
    # A prompt is written before the text: where that is one token, it is a marker.
    prompts = [tokenizer.tokenize((config.get("prompts") or {}).get(role) or "") for role in ("query", "document")]
    return dict(architecture="colbert", query_expansion=bool(expansion),
                query_length=expansion["length"] if expansion else transformer.get("query_length") or limit,
                passage_length=transformer.get("document_length") or limit, skiplist=skiplist,
                attend_to_masks=bool(expansion and expansion.get("attend")),
                markers=[tokens[0] if len(tokens) == 1 else "" for tokens in prompts])


def _pooling(folder: str, config: dict) -> str:
    mode = config.get("pooling_mode") or [k.split("_")[2] for k, v in config.items() if k.startswith("pooling_mode_") and v]
    mode = [mode] if isinstance(mode, str) else mode
    if mode not in (["cls"], ["mean"]) or config.get("pooling_mode_mean_sqrt_len_tokens"):
        raise ValueError(f"{folder}/config.json pools by {', '.join(mode) or 'nothing'}; a student does by cls or mean")
    return mode[0]


def _dense(name: str, path: str) -> torch.Tensor:
    """A Dense module's matrix float32 [out, in]: no bias, no activation, perhaps with the residual path added."""
    config = _json(name, f"{path}/config.json")
    file = find(name, f"{path}/model.safetensors") or find(name, f"{path}/pytorch_model.bin")
    if config is None or file is None:
        raise ValueError(f"{name}/{path} lacks {'config.json' if config is None else 'model.safetensors'}, which modules.json "
                         f"speaks of; {AGAIN}")
    if config.get("bias", True) or config.get("activation_function", "Tanh").rsplit(".", 1)[-1] != "Identity":
        raise ValueError(f"{name}/{path}/config.json has a bias or the activation {config.get('activation_function')}: "
                         f"a student's projection is linear, so this model cannot be one")
    return _linear(file, config)


def _linear(path: Path, config: dict | None = None) -> torch.Tensor | None:
    """`linear.weight` of a weights file, where it is there; a Dense's config says what else has to be."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:
                tensors = {k: f.get_tensor(k) for k in f.keys() if k.startswith(("linear.", "residual."))}
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, UnpicklingError) as e:
        said = " ".join(str(e).split())[:120]
        raise ValueError(f"{path} cannot be read as weights ({said}): it is incomplete; {AGAIN}") from e
    weight = tensors.get("linear.weight")
    if weight is not None and "linear.bias" in tensors:
        raise ValueError(f"{path} has a linear.bias: a student's projection has none, so this model cannot be one")
    if config is None:
        return weight
    shape = [config["out_features"], config["in_features"]]
    if weight is None or list(weight.shape) != shape:
        found = "no linear.weight" if weight is None else f"linear.weight of shape {list(weight.shape)}"
        raise ValueError(f"{path} has {found}, where its config.json says {shape}; {AGAIN}")
    if not config.get("use_residual"):
        return weight.float()
    if "residual.weight" not in tensors and shape[0] != shape[1]:
        raise ValueError(f"{path} has no residual.weight, which its config.json speaks of; {AGAIN}")
    return weight.float() + tensors.get("residual.weight", torch.eye(shape[0])).float()


def find(name: str, filename: str) -> Path | None:
    """A file of a local folder or of a Hub repository; None where there is none. Raises ValueError where that is not known:
    without its modules.json a trained model would pass for a plain encoder."""
    if Path(name).is_dir():
        path = Path(name) / filename
        return path if path.exists() else None
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache
    try:
        return Path(hf_hub_download(name, filename))
    except errors.LocalEntryNotFoundError as e:
        # Known to be absent: asked for before, or `hf download` brought all files, .gitattributes too.
        if isinstance(try_to_load_from_cache(name, ".gitattributes"), str) or (
                try_to_load_from_cache(name, filename) is not None):
            return None
        raise ValueError(cannot_load(name, e)) from e
    except errors.EntryNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise ValueError(cannot_load(name, e)) from e


def _json(name: str, filename: str, kind: type = dict):
    path = find(name, filename)
    if path is None:
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is no JSON ({e}); {AGAIN}") from e
    if not isinstance(value, kind):
        raise ValueError(f"{path} holds a {type(value).__name__} where a {kind.__name__} is expected; {AGAIN}")
    return value


def cannot_load(name: str, error: Exception) -> str:
    said = " ".join(str(error).split())[:200]
    if Path(name).is_dir():
        return f"cannot load the folder {name} ({said}); {AGAIN}"
    return (f"cannot load {name!r}: no local folder with a model, and the Hugging Face Hub did not give one "
            f"({said[:120]}); with no network, download it elsewhere "
            f"(`hf download NAME --local-dir FOLDER`) and give the folder")


def digest(folder: str | Path) -> str:
    """Which weights and settings these are, in 16 hexadecimal digits: those of the folder and of its modules (1_Dense)."""
    h = hashlib.blake2b(digest_size=8)
    folder = Path(folder)
    # Files of tokenizers that have no tokenizer.json, which is read where there is one.
    slow = () if (folder / "tokenizer.json").exists() else ("vocab.txt", "merges.txt", "spiece.model", "tokenizer.model")
    for path in sorted([*folder.glob("*"), *folder.glob("[0-9]_*/*")]):
        if path.suffix in (".safetensors", ".bin", ".json", ".metadata") or path.name in slow:
            h.update(path.relative_to(folder).as_posix().encode())
            with open(path, "rb") as file:
                for part in iter(lambda: file.read(1 << 24), b""):
                    h.update(part)
    return h.hexdigest()


# Writing ------------------------------------------------------------------------------------------------------------

def save(student, folder: str | Path) -> None:
    """One folder for colbert-ai, PyLate, sentence-transformers and ourselves; see this file's first lines."""
    folder, s = Path(folder), student.settings
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)  # written last: no folder loads without it, nor one that is half written
    no_truncation(student.tokenizer)
    student.tokenizer.save_pretrained(folder)
    state = {f"{student.encoder.base_model_prefix}.{k}": v for k, v in student.encoder.state_dict().items()}
    # The others would draw a projection where there is none: theirs is the identity.
    weight = student.linear.weight if s["dim"] else torch.eye(student.dim)
    if student.colbert:
        state["linear.weight"] = weight
    _write_tensors(folder / "model.safetensors", state)
    modules = [("", "sentence_transformers.models.Transformer")]
    if student.colbert:
        modules.append(("1_Dense", "pylate.models.Dense.Dense"))
        # Punctuation that the tokenizer does not know is its [UNK] here, as in ColBERT; sentence-transformers wants that said.
        unknown = student.tokenizer.unk_token
        skiplist = list(dict.fromkeys(unknown if student.token_id(w) is None else w for w in s["skiplist"]))
        config = dict(model_type="ColBERT", similarity_fn_name="MaxSim", prompts={}, default_prompt_name=None,
                      query_prefix=s["markers"][0], document_prefix=s["markers"][1], query_length=s["query_length"],
                      document_length=s["passage_length"], do_query_expansion=s["query_expansion"],
                      attend_to_expansion_tokens=s["attend_to_masks"], skiplist_words=skiplist)
        _write_json(folder / METADATA, dict(
            dim=student.dim, query_maxlen=s["query_length"], doc_maxlen=s["passage_length"], similarity="cosine",
            mask_punctuation=bool(skiplist), attend_to_mask_tokens=s["attend_to_masks"], query_token="[Q]", doc_token="[D]",
            query_token_id=s["markers"][0] or "[unused0]", doc_token_id=s["markers"][1] or "[unused1]"))
    else:
        modules.append(("1_Pooling", "sentence_transformers.models.Pooling"))
        _write_json(folder / "1_Pooling" / "config.json", {
            "word_embedding_dimension": student.encoder.config.hidden_size,
            **{f"pooling_mode_{k}": s["pooling"] in k for k in ("cls_token", "mean_tokens")}})
        if s["dim"]:
            modules.append(("2_Dense", "sentence_transformers.models.Dense"))
        config = dict(model_type="SentenceTransformer", similarity_fn_name="dot", prompts={}, default_prompt_name=None)
    for path, kind in modules:
        if kind.endswith("Dense"):
            _write_json(folder / path / "config.json", dict(in_features=weight.shape[1], out_features=weight.shape[0],
                                                            bias=False,
                                                            activation_function="torch.nn.modules.linear.Identity"))
            _write_tensors(folder / path / "model.safetensors", {"linear.weight": weight})
    _write_json(folder / "modules.json", [dict(idx=n, name=str(n), path=path, type=kind)
                                          for n, (path, kind) in enumerate(modules)])
    _write_json(folder / "config_sentence_transformers.json", config)
    _write_json(folder / "sentence_bert_config.json",
                dict(max_seq_length=max(s["query_length"], s["passage_length"]), do_lower_case=False))
    _write_json(folder / OURS, s)
    (folder / "README.md").write_text(card(student), encoding="utf-8")
    student.encoder.config.save_pretrained(folder)


def _write_tensors(path: Path, tensors: dict) -> None:
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def _write_json(path: Path, value) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


USES = {
    "pairdistill": """from pairdistill import Student
student = Student.from_pretrained(FOLDER)
q, q_mask = student.encode_queries(queries)
d, offsets = student.encode_passages(passages)""",
    "PyLate": """from pylate import models
model = models.ColBERT(FOLDER)
q, d = model.encode(queries, is_query=True), model.encode(passages, is_query=False)""",
    "sentence-transformers, from 6.0 on": """from sentence_transformers import MultiVectorEncoder
model = MultiVectorEncoder(FOLDER)
q, d = model.encode_query(queries), model.encode_document(passages)""",
    "colbert-ai": """from colbert.infra import ColBERTConfig
from colbert.modeling.checkpoint import Checkpoint
model = Checkpoint(FOLDER, ColBERTConfig())
q, d = model.queryFromText(queries), model.docFromText(passages)""",
    "sentence-transformers": """from sentence_transformers import SentenceTransformer
model = SentenceTransformer(FOLDER)
q, d = model.encode(queries), model.encode(passages)"""}


def card(student) -> str:
    """The model card: what the Hub reads of a model, its settings, and how each library loads it."""
    s, late = student.settings, student.colbert
    front = ["library_name: PyLate", "pipeline_tag: feature-extraction"] if late else [
        "library_name: sentence-transformers", "pipeline_tag: sentence-similarity"]
    tags = ["pairdistill", "sentence-transformers", *(["PyLate", "ColBERT", "multi-vector", "late-interaction"] if late else [])]
    base = [f"base_model: {s['base_model']}"] if s["base_model"] else []
    lines = ["---", *front, *base, "tags:", *(f"- {tag}" for tag in tags), "---", "",
             "# A dense retriever distilled by PairDistill", "",
             f"A vector of {student.dim} dimensions a token, scored by MaxSim." if late else
             f"One vector of {student.dim} dimensions a text, scored by the dot product.",
             "[PairDistill](https://arxiv.org/abs/2410.01383) trains it on what pointwise and pairwise rerankers say.", "",
             "## Settings", "", "```json", json.dumps({"encoder": student.encoder.config.model_type, **s}, indent=1), "```", "",
             "## Use", ""]
    for library in list(USES)[:4] if late else ["pairdistill", "sentence-transformers"]:
        lines += [f"With {library}:", "", "```python", USES[library], "```", ""]
    if late and not (all(s["markers"]) and s["query_expansion"] and set(s["skiplist"]) in (set(string.punctuation), set())):
        lines.append("colbert-ai marks every text, expands every query and skips all punctuation or nothing; this student does "
                     "not, and its scores differ there.")
    if not late:
        lines.append(f"Queries are cut after {s['query_length']} tokens here, and like passages there.")
    return "\n".join(lines) + "\n"
