"""Curation of chains of thought: `get_config('cremad' | 'iemocap')`.

    python -m ambijax.curate --config configs/curate.py:cremad --manifest=data/cremad --out=cot.jsonl --dry_run

The key is read from the environment variable that `api_key_env` names, never from here.
Another provider or a local server is another base_url, model, and their prices and limits.
"""

from ml_collections import ConfigDict

from ambijax import emotions


def get_config(corpus: str = "cremad") -> ConfigDict:
    c = ConfigDict()
    labels = {"cremad": emotions.CREMAD, "iemocap": emotions.IEMOCAP}
    if corpus not in labels:
        raise ValueError(f"no variant {corpus!r}; choose one of {', '.join(labels)}, as in configs/curate.py:cremad")
    c.labels = labels[corpus]  # votes outside these classes do not count

    c.teacher = "audio"  # audio: the model hears the clip; acoustics: it reads measurements; template: no model
    c.validator = "judge"  # the paper's consistency check; reader: a blind reader must predict p; none
    c.max_js = 0.1  # bits between p and the blind reader; about half of what the paper's models reach (.17 to .20)
    c.attempts = 3  # drafts an item before it is kept for the KL alone; few that fail twice pass later
    c.max_words = 220  # asked of the teacher; the paper's chains of thought are about 150 words
    c.max_chars = 2400  # enforced: 220 words of 6.5 characters with their spaces, and two thirds of that in reserve
    c.norm_clips = 4  # a speaker with fewer is held against the corpus when acoustics are put into words

    c.max_usd = 100.0  # bounds all runs into one --out; CREMA-D takes $43 when all first drafts pass, $245 at most
    c.max_items = 0  # the first so many utterances of the manifest; 0: all
    c.concurrency = 8  # requests under way; 8 at 5 s each are 96 a minute, more than the tokens of tier 1 allow

    c.calls = ConfigDict()
    c.calls.timeout_s = 120.0  # a draft takes 3 to 15 s; an answer that late has been lost
    c.calls.retries = (
        6  # after 429, 5xx, timeouts, lost connections and garbage; the waits below add up to 1 or 2 minutes
    )
    c.calls.backoff_s = 2.0  # doubles with each retry, half of it random; a Retry-After of the server comes first
    c.calls.backoff_max_s = 120.0  # also the longest Retry-After that is obeyed
    c.calls.drain_s = 20.0  # a run that has to stop waits so long for answers it is paying for

    c.writer = ConfigDict()
    c.writer.model = "gpt-audio-1.5"  # successor of gpt-4o-audio-preview, which was shut down on 2026-05-07
    c.writer.base_url = "https://api.openai.com/v1"
    c.writer.api_key_env = "OPENAI_API_KEY"
    c.writer.rpm = 500  # OpenAI, usage tier 1; tier 2 allows 5,000
    c.writer.tpm = 30_000  # OpenAI, usage tier 1; tier 2 allows 450,000
    c.writer.usd_per_1m = ConfigDict({"text_in": 2.5, "audio_in": 32.0, "text_out": 10.0})  # OpenAI's page, 2026
    c.writer.bytes_per_token = 3.0  # English is nearer to 4.5: counts from above, for limits and budget
    c.writer.audio_tokens_per_s = 10.0  # one each 100 ms
    c.writer.max_completion_tokens = 600  # 220 words are about 330 tokens
    c.writer.expected_tokens = 300  # for the estimate
    c.writer.options = ConfigDict({"modalities": ("text",), "temperature": 1.0})  # sent as they are

    c.judge = ConfigDict()
    c.judge.model = "gpt-5.4-mini"  # text only: audio models refuse a request without audio
    c.judge.base_url = "https://api.openai.com/v1"
    c.judge.api_key_env = "OPENAI_API_KEY"
    c.judge.rpm = 500  # OpenAI, usage tier 1
    c.judge.tpm = 200_000  # cautious; look up what your account has
    c.judge.usd_per_1m = ConfigDict({"text_in": 0.75, "audio_in": 0.0, "text_out": 4.5})  # OpenAI's page, 2026
    c.judge.bytes_per_token = 3.0
    c.judge.audio_tokens_per_s = 0.0  # hears nothing
    c.judge.max_completion_tokens = 200  # one word and one sentence, or one JSON object
    c.judge.expected_tokens = 20  # for the estimate
    c.judge.options = ConfigDict({"reasoning_effort": "none"})  # a verdict needs none, and its tokens are billed
    return c
