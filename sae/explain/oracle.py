"""The client that knows the rule: what a perfect language model would say, by executing it."""

from sae.explain.judges import Rule, RuleJudge, read_question
from sae.explain.llm.chat import Request, Response
from sae.explain.llm.stand_ins import reply


class OracleClient:
    """Reads every question back from its prompt and answers it by a rule.

    That it can is the proof that prompts say what they should: a text that forged a mark or an item
    would make it wrong.
    """

    def __init__(self, rule: Rule, label: str, name: str = "oracle") -> None:
        """Keep the rule, what it is called in words, and a name."""
        self._judge, self._label, self.name = RuleJudge(rule), label, f"{name} {label}"

    async def complete(self, request: Request) -> Response:
        """The right answer."""
        task, _, items = read_question(request)
        if task.startswith("explain"):
            return reply(request, f"LABEL: {self._label}")
        numbers = [round(number) for number in self._judge.decide(task, items)]
        return reply(request, str(numbers))
