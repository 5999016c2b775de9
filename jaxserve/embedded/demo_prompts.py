"""Three prompts that show what the embedded model can do; texts alone, no model."""

STORY_PROMPT = "Tell a story about Bela."
SUM_PROMPT = "What is 17 + 25?"
RETRIEVAL_PROMPT = (
    "Read this text. The fox walked near the river in the morning. Remember that the code of "
    "Tamiro is 48213. There was snow over the hill last summer. They say the town chosen by Tamiro "
    "is Velodale. Nobody found the lamp near the mill. The secret code of Belasu is 90177. A bear "
    "and an owl danced together. Question: What is the code of Tamiro?"
)
DEMO_PROMPTS = (STORY_PROMPT, SUM_PROMPT, RETRIEVAL_PROMPT)
