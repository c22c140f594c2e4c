"""How a model writes a tool call around its name and its arguments."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CallEnvelope:
    """Texts around the names and the JSON arguments of tool calls; markers in them may be special tokens.

    One call is `begin + before_name + NAME + before_arguments + ARGUMENTS + after_arguments + end`. Between
    `after_arguments` of a call and `before_name` of the next one is `between_calls`.
    """

    before_name: str
    before_arguments: str
    after_arguments: str = ""
    begin: str = ""
    end: str = ""
    between_calls: str = ""
    marker: str = ""
    """Beginning of the first call, by which it differs from text; "" if a call is the whole message instead."""

    def write(self, calls: list[tuple[str, str]]) -> str:
        """Return calls, as name and JSON of the arguments, as the model writes them."""
        texts = (self.before_name + name + self.before_arguments + json + self.after_arguments for name, json in calls)
        return self.begin + self.between_calls.join(texts) + self.end
