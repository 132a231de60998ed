"""A model's own answers to varied questions, as JSON lines of conversations: chat data that needs no other source.

    python scripts/smollm2/chat.py --teacher smollm2-135m-instruct --prose text/prose.jsonl --out text/chat.jsonl --tokens 300000

Half of the questions are the model's own: it is given the beginning of a user's turn and samples what a user might ask. The others
are written here, about many subjects, about countries, and about passages of `--prose`. More tokens may be added to a file
later with another seed.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from torch import Tensor

from sala.data import load_tokenizer
from sala.model import new_cache
from sala.model.families import load_model

SUBJECTS = """gravity; photosynthesis; volcanoes; the moon; black holes; earthquakes; electricity; magnets; rainbows; the water cycle;
dinosaurs; whales; honey bees; penguins; elephants; vaccines; the human heart; the brain; sleep; vitamins; exercise; healthy eating;
stress; antibiotics; DNA; evolution; bacteria; viruses; the immune system; the Roman Empire; ancient Egypt; the Great Wall of China;
the French Revolution; the Industrial Revolution; the printing press; Leonardo da Vinci; Isaac Newton; Marie Curie; Albert Einstein;
Shakespeare; Mozart; democracy; inflation; taxes; budgeting; supply and demand; recycling; climate change; renewable energy; solar
panels; electric cars; computers; the internet; programming in Python; sorting algorithms; databases; neural networks; encryption;
passwords; job interviews; cover letters; time management; public speaking; teamwork; leadership; learning a language; baking bread;
cooking rice; growing tomatoes; houseplants; cats; dogs; camping; swimming; chess; football; music theory; painting; photography;
poetry; short stories; Paris; Japan; Brazil; Canada; India; Australia; Kenya; the Sahara desert; the Pacific Ocean; Mount Everest;
Antarctica; fractions; percentages; prime numbers; the Pythagorean theorem; probability; geometry; logic; friendship; honesty;
patience; courage; happiness; creativity; memory; habits; rivers; forests; bridges; trains; airplanes; clocks; maps; money; trade;
law; education; libraries; museums; newspapers; radio; theatre; glass; steel; paper; gold; salt; sugar; tea; coffee; chocolate;
potatoes; horses; birds; insects; storms; snow; the sun; comets; telescopes; microscopes; atoms; acids; light; sound; energy"""
ABOUT_SUBJECTS = """What is {a}?; Tell me about {a}.; Explain {a} to a child.; Give me three facts about {a}.; Why does {a} matter?; Write a
short paragraph about {a}.; How would you describe {a} in two sentences?; What should everyone know about {a}?; List five questions a
student might ask about {a}.; Write a short story that involves {a}.; Write a poem about {a}.; What do people often get wrong about
{a}?; How has {a} changed over time?; Give an example that helps to understand {a}.; Write an email to a friend about {a}.; Make a
list of tips about {a}.; Compare {a} with {b}.; What do {a} and {b} have in common?"""
COUNTRIES = """France; Germany; Italy; Spain; Portugal; Greece; Poland; Sweden; Norway; Finland; Denmark; Austria; Hungary; Ireland;
Russia; Turkey; Egypt; Kenya; Nigeria; Morocco; Ethiopia; India; China; Japan; Thailand; Vietnam; Indonesia; Australia; Canada;
Mexico; Brazil; Argentina; Chile; Peru; Colombia; Cuba; Iran; Israel; Pakistan; Nepal; Iceland; Belgium; Switzerland; Ukraine"""
ABOUT_COUNTRIES = (
    "What is the capital of {a}?; Which continent is {a} in?; What languages are spoken in {a}?; What is {a} known for?"
)
ABOUT_PASSAGES = """Summarize the following text in a few sentences.\n\n{a}
---
Read this text and explain its main point.\n\n{a}
---
{a}\n\nWhat is this text about?
---
Rewrite the following in simpler words.\n\n{a}"""

# shares of the questions that are written here
PASSAGES, FACTS = 0.15, 0.12
QUESTION_TOKENS, ANSWER_TOKENS = 70, 220
GREEDY_SHARE, TEMPERATURE, TOP_K = 0.3, 0.7, 50
ENOUGH = 0.9


def split(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split(";")]


def passages(file: Path, rng: random.Random) -> list[str]:
    """Return pieces of 60 to 140 words, one of each document that is long enough."""
    pieces = []
    for line in file.read_text(encoding="utf-8").splitlines():
        words = json.loads(line)["text"].split()
        if len(words) > 200:
            start = rng.randrange(len(words) - 150)
            pieces.append(" ".join(words[start : start + rng.randrange(60, 140)]))
    return pieces


def question(rng: random.Random, pieces: list[str]) -> str:
    share = rng.random()
    if share < PASSAGES:
        return rng.choice(ABOUT_PASSAGES.split("\n---\n")).format(a=rng.choice(pieces))
    if share < PASSAGES + FACTS:
        return rng.choice(split(ABOUT_COUNTRIES)).format(a=rng.choice(split(COUNTRIES)))
    a, b = rng.sample(split(SUBJECTS), 2)
    return rng.choice(split(ABOUT_SUBJECTS)).format(a=a, b=b)


@torch.no_grad()
def sample(model, ids_BT: Tensor, mask_BT: Tensor, most: int, end: int, temperature: float) -> Tensor:
    """Return up to `most` sampled tokens a row (B, N), `end` from a row's end on; it stops when most rows have ended."""
    cache, new_B1, tokens = new_cache(model.config), ids_BT, []
    ended_B = torch.zeros(len(ids_BT), dtype=torch.bool)
    for _ in range(most):
        logits_BX = model(new_B1, attention_mask=mask_BT, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        if temperature == 0:
            token_B = logits_BX.argmax(dim=-1)
        else:
            best_BK, index_BK = (logits_BX / temperature).topk(TOP_K)
            token_B = index_BK.gather(1, torch.multinomial(best_BK.softmax(dim=-1), 1))[:, 0]
        token_B = torch.where(ended_B, end, token_B)
        ended_B |= token_B == end
        tokens.append(token_B)
        if ended_B.float().mean() > ENOUGH:
            break
        new_B1, mask_BT = token_B[:, None], torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], dim=1)
    return torch.stack(tokens, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--prose", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    torch.manual_seed(options.seed)
    tokenizer, model = load_tokenizer(options.teacher), load_model(options.teacher, dtype=torch.bfloat16)
    tokenizer.padding_side = "left"
    end, pieces = tokenizer.eos_token_id, passages(options.prose, rng)

    def prompt(text: str, **more: bool) -> str:
        return tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, **more)

    def answers(prompts: list[str], most: int, temperature: float) -> list[list[int]]:
        encoded = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        rows = sample(model, encoded["input_ids"], encoded["attention_mask"], most, end, temperature)
        return [row[: row.index(end)] if end in row else row for row in rows.tolist()]

    # what comes before a user's words
    beginning = prompt("WORDS").partition("WORDS")[0]
    count, started = 0, time.monotonic()
    while count < options.tokens:
        if rng.random() < 0.5:
            asked = answers([beginning] * options.batch, QUESTION_TOKENS, 1.0)
            # a question that did not end is none
            questions = [tokenizer.decode(row).strip() for row in asked if len(row) < QUESTION_TOKENS]
        else:
            questions = [question(rng, pieces) for _ in range(options.batch)]
        questions = [text for text in questions if len(text) > 10]
        if not questions:
            continue
        temperature = 0.0 if rng.random() < GREEDY_SHARE else TEMPERATURE
        said = answers([prompt(text, add_generation_prompt=True) for text in questions], ANSWER_TOKENS, temperature)
        with options.out.open("a", encoding="utf-8") as file:
            for text, row in zip(questions, said, strict=True):
                if answer := tokenizer.decode(row, skip_special_tokens=True).strip():
                    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
                    file.write(json.dumps({"messages": turns}) + "\n")
        # an answer that was cut off is kept: distillation learns the teacher's distribution, not that it ends there
        count += sum(map(len, said))
        print(f"{count:,} tokens, {count / (time.monotonic() - started):.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
