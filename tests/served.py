"A tiny model behind the server, for tests: random weights, so that it writes bytes that are no characters."
from llm_scratch.architecture import Decoder, ModelConfig
from llm_scratch.assistant import CHAT_TEMPLATE
from llm_scratch.server import Served
from llm_scratch.serving import BatchEngine
from llm_scratch.tokenization import Tokenizer, train_bpe
from models import filled

TEXTS = ["the cat sat on the mat, and the dog sat on the log. café naïve 🍮 — ünïcödé" * 3]


def tiny_tokenizer(n_merges:int=40)->Tokenizer: return train_bpe(TEXTS, 256 + n_merges + 3)


def tiny_model(seed:int=0, context_len:int=256, tok:Tokenizer|None=None)->Decoder:
    return filled(Decoder(ModelConfig(vocab_size=(tok or tiny_tokenizer()).vocab_size, context_len=context_len, n_layers=1, n_heads=2, n_kv_heads=1, d_model=32, d_ff=32, d_head=16)), seed)


def tiny_served(*, chat:bool=True, seed:int=0, context_len:int=256, name:str="tiny", guard=None, **engine)->Served:
    tok = tiny_tokenizer()
    return Served(BatchEngine(tiny_model(seed, context_len, tok), **engine), tok, CHAT_TEMPLATE if chat else None, name, context_len, guard)
