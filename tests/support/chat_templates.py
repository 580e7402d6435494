"""Chat templates with one difficulty each."""

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
THINKS = (  # as Qwen3's: an empty block of thoughts before the last answer, and no other
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENINGS = {"no generation prompt": (TURNS, "<|im_start|>assistant\n"), "thoughts": (THINKS, "<think>\n\n</think>\n\n")}
CLOCK = "{{ strftime_now('%d %b %Y') }}, {{ strftime_now('%A') }}\n"
