"""FLOPs against counts by hand."""

from core.flops import flops, forward_flops, hardware_flops
from core.folder import ModelConfig

QWEN_7B = ModelConfig(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
# P_mlp = 3 x 3584 x 18944 = 203,685,888; P_attn = 2 x 3584 x (3584 + 512) = 29,360,128
BLOCKS = 2 * 28 * (203_685_888 + 29_360_128)  # FLOPs per token: 13,050,576,896
HEAD = 2 * 152064 * 3584  # per token: 1,089,994,752
PAIR = 4 * 28 * 3584  # per query and key: 401,408


def test_the_papers_flops_of_qwen_7b_worked_by_hand():
    # F_fwd(1000) = 2 x (6,525,288,448 + 1,089,994,752) + 4 x 1000 x 28 x 3584
    thousand = 1000 * (15_230_566_400 + 401_408_000)
    ten = 10 * (15_230_566_400 + 4_014_080)
    assert forward_flops(QWEN_7B, [1000]) == thousand
    assert forward_flops(QWEN_7B, iter([1000, 10])) == thousand + ten
    assert flops(QWEN_7B, [1000, 10], n_head=3, cached=[5, 5]).paper == thousand + ten
    assert flops(QWEN_7B, []) == (0, 0, 0)


def test_a_machine_computes_the_causal_half_and_the_head_where_it_is_asked_for():
    pairs = (1000**2 + 10**2) / 2
    blocks = 1010 * BLOCKS + pairs * PAIR
    assert flops(QWEN_7B, iter([1000, 10]))[1:] == (blocks, 1010 * HEAD)
    assert flops(QWEN_7B, [1000, 10], n_head=400)[1:] == (blocks, 400 * HEAD)
    assert hardware_flops(QWEN_7B, [1000, 10], n_head=400) == blocks + 400 * HEAD


def test_a_group_reads_its_prompt_once():
    """Four responses of 3 tokens to a prompt of 100: it is read once, and gives the first logits;
    the last token of a response is drawn, and never read."""
    prompt = hardware_flops(QWEN_7B, [100], n_head=1)
    responses = hardware_flops(QWEN_7B, [102] * 4, n_head=8, cached=iter([100] * 4))
    read = 100 + 4 * 2
    # query at position p sees p + 1 keys; half a key per query is what the count leaves out
    pairs = 100 * 101 / 2 + 4 * (101 + 102)
    assert prompt + responses == read * BLOCKS + 9 * HEAD + (pairs - read / 2) * PAIR


def test_flops_count_query_heads_wider_than_the_model():
    # D 24, D_q = 4 x 8, D_kv = 2 x 8, 2 layers, MLP 40
    config = ModelConfig(
        vocab_size=10,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    per_token = 2 * (2 * (3 * 24 * 40 + 2 * 24 * (32 + 16)) + 2 * 10 * 24)
    assert forward_flops(config, [3, 5]) == 8 * per_token + 4 * (9 + 25) * 2 * 32
