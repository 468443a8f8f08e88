"""Refusals: whether a rewriter declined instead of rewriting, told by the opening of what it wrote.

A refusal speaks of the task: somebody apologises or cannot, and what they cannot do is to help with, write or continue this
text. The same words about anything else ("I can't believe ...", "I'm sorry for your loss") are text like any other.
"""

from __future__ import annotations

import re

_OPENING_CHARS = 400
_LEADING = " \t\r\n\"'“”‘’«»*_#>-–—.,;:!()[]"
_QUOTES = str.maketrans({"’": "'", "‘": "'", "`": "'", "´": "'", "ʼ": "'"})

_SORRY = (
    r"(?:(?:i am |i'm |we are |we're )?(?:so |very |really |truly |terribly |deeply )*sorry|(?:my "
    r"|i offer my )?(?:sincere )?apologies"
    r"|(?:i|we) (?:do |sincerely )?apologi[sz]e)"
)
_ALAS = r"(?:unfortunately|sadly|regrettably|(?:i'm|i am) afraid|i regret)"
_MODEL = (
    r"as (?:an? )?(?:responsible |helpful |harmless |and )*(?:ai(?: (?:language )?model| assistant| system)?"
    r"|(?:large )?language model"
    r"|assistant|chat ?bot),? "
)
# From an apology or a polite beginning to what it leads to.
_SO = r"(?:[^.!?]{0,160}?[,;:.!]? (?:but|however|yet),?|[,;:.!–-]|[^.!?]{0,60} (?:that|to say)|)? ?(?:that )?"
_POLITE = rf"(?:(?:i (?:understand|appreciate|see|know|reali[sz]e|hear)|thank you|thanks|i would|i'd)\b{_SO})"
_CANNOT = (
    r"(?:i|we)(?: really| simply| just| also)?(?: (?:can ?not|can't|will not|won't|would not|wouldn't|must not"
    r"|should not|shouldn't"
    r"|(?:do not|don't) (?:think i (?:can|should)|feel (?:able|comfortable|right))|would (?:prefer|rather) not"
    r"|am (?:really )?(?:not (?:able|allowed|permitted|comfortable|willing|going|designed|programmed)|unable"
    r"|unwilling|prohibited)"
    r"|are (?:not able|unable)|(?:have|need|am going|must|will) (?:to )?(?:have to )?(?:respectfully "
    r"|politely )?(?:decline|refuse)"
    r"|(?:respectfully |politely )?(?:decline|refuse))"
    r"|'d (?:prefer|rather) not|'m (?:really )?(?:not (?:able|allowed|permitted|comfortable|willing|going"
    r"|designed|programmed)"
    r"|unable|unwilling|prohibited)|'re (?:not able|unable)|'ll (?:have to )?(?:decline|refuse))"
    r"(?:,? (?:to|be able to|be|with|from|and will not|and won't|in good (?:conscience|faith)|ethically"
    r"|responsibly|safely|simply"
    r"|really|just|directly|knowingly|possibly|comfortable),?)*"
)
_END = r"(?:$|[.!,;])"
# Doing these is the task, whatever comes after; "help" and "do" are it only with words that point at the request.
_TASK = (
    r"(?:(?:re-?writ|re-?phras|paraphras)(?:e|ing)|comply(?:ing)?|assist(?:ing)?|fulfil+(?:ing)?"
    r"|satisfy(?:ing)? (?:this|that|your)"
    r"|engag(?:e|ing) (?:with|in)"
    r"|help(?:ing)?(?: you)?(?: with (?:that|this|it)(?: request| one| task| text)?)?(?:$|[.!,;]| as| because| since)"
    r"|help(?:ing)?(?: you)? with (?:your request|such|(?:creat|writ|rewrit|mak|generat|produc|continu)ing)"
    r"|(?:do|doing) (?:that|this|so|what you)(?: as| because| request| for you))"
)
# Doing these is the task when it is said that this text is meant, or after an apology.
_WRITE = r"(?:help(?!ing| but| myself| \w+ing)|(?:writ|continu|creat|generat|produc|provid)(?:e|ing))\b"
_OTHER = (
    r"(?:(?:complet|shar|mak|promot|giv|facilitat|improv|reproduc|participat)(?:e|ing)|(?:offer|support|discuss"
    r"|process|respond|answer"
    r"|finish|extend|transform|edit|repeat|copy|proceed)(?:ing)?|go(?:ing)? on|carry(?:ing)? on)\b"
)
_MATTER = (
    r"(?:content|material|request|rewrit|continuation|passage|prompt|instruction|guidance|assistance"
    r"|(?:this|that|your|such) (?:\w+ )?(?:text|story|version|language|response|information|topic|paragraph|kind)"
    r"|version of (?:x|this|that|it)\b|harmful|explicit|offensive|hate|violen|sexual|illegal|unsafe"
    r"|inappropriate|discriminat"
    r"|dangerous|derogatory|abusive|insult|demean|degrad)"
)
_THIS_TEXT = rf"(?:{_WRITE}(?: with)? (?:this|that|it)(?: one)?{_END}|(?:{_WRITE}|{_OTHER})[^.!?]{{0,60}}?{_MATTER})"
_REWRITE = r"(?:re-?writ|re-?phras|paraphras)(?:e|ing)"
_HENCE = r"[.!?,;:]?(?: so| and| but| therefore| thus| hence)*,? "
_TEXT = r"(?:request|prompt|passage|continuation|text|topic)"
_FAULT = r"(?:harmful|hateful|explicit|offensive|inappropriate|hate|slurs|unethical|not appropriate|violent)"

_FORMS = (
    # Sorry, but I cannot (write, ...). Unfortunately, I cannot (write this passage).
    rf"(?:{_SORRY}{_SO}|{_SORRY}?,? ?{_ALAS},? ?(?:but )?(?:that )?)(?:{_MODEL})?{_CANNOT} ?"
    rf"(?:{_TASK}|do(?:ing)? (?:that|this|so){_END}|{_THIS_TEXT}|(?:{_WRITE})?{_END})",
    rf"{_SORRY}{_SO}(?:{_MODEL})?{_CANNOT} {_WRITE}",
    rf"{_SORRY}{_SO}(?:(?:this|that|your) {_TEXT}\b|(?:that|this|it)(?:'s| is) not something i|(?:that|this"
    rf"|it) goes (?:against|beyond))",
    # I cannot (write this passage).
    rf"(?:{_MODEL}|no,? |please note(?:: | that )|however,? |{_POLITE})?{_CANNOT} (?:{_TASK}|{_THIS_TEXT})",
    r"i (?:(?:have|need|am going|must|will) (?:to )?(?:have to )?(?:respectfully |politely )?(?:decline|refuse)"
    r"|respectfully decline|decline"
    r"|refuse|'ll have to decline)(?:$|[.!]| (?:this|that|your|the|such) (?:request|task|prompt))",
    r"(?:i am|i'm) going to (?:have to )?(?:respectfully |politely )?(?:decline|refuse)"
    r"(?:$|[.!]| (?:this|that|your|the|such) (?:request|task|prompt))",
    # It is harmful, so I cannot rewrite this. The text is harmful, so I cannot rewrite it.
    rf"[^.!?]{{0,160}}{_HENCE}{_CANNOT} {_REWRITE} (?:this|that|such|the (?:\w+ )?(?:text|passage|content|continuation))"
    r"(?:$|[.!,;]| (?:text|passage|content|for you|as|because))",
    rf"[^.!?]{{0,60}}\b(?:content|text|passage|request|prompt|continuation)\b[^.!?]{{0,120}}{_HENCE}{_CANNOT}"
    rf" {_REWRITE} it{_END}",
    r"(?:i|we) (?:can ?not|can't) (?:and|or) (?:will not|won't|shall not)\b",
    r"i (?:do not|don't) (?:write|provide|create|generate|produce|engage in)[^.!?]{0,40}? (?:content|material"
    r"|insults|slurs|hate|explicit)",
    # What I am.
    rf"{_MODEL}(?:i|my|it)\b",
    r"(?:i'm|i am) (?:just |only )?(?:an ai\b|a (?:large )?language model|programmed to (?:be|provide|avoid|follow))",
    r"(?:my|our) (?:safety |content |ethical )?(?:guidelines|programming|policy|policies|principles)[^.!?]{0,40} "
    r"(?:prevent|prohibit|forbid|(?:do|does) not allow|don't allow|doesn't allow)",
    # What you ask.
    rf"(?:this|that|your|the) {_TEXT}(?: you (?:provided|shared))? (?:goes against|violates|conflicts with"
    rf"|would violate"
    rf"|asks (?:me )?(?:for|to)|(?:contains|promotes|includes) (?:\w+ ){{0,3}}{_FAULT}|(?:is|seems"
    rf"|appears to be) (?:\w+ )?{_FAULT})",
    rf"(?:it|this|that)(?:'s| is| would be| would| wouldn't be| isn't)(?: not)?(?: be)? (?:{_FAULT}|appropriate"
    rf"|right|ethical|within my)"
    r"[^.!?]{0,40}?(?:for me to|to (?:write|rewrite|continue|create|generate|provide)|guidelines|programming)",
    r"(?:that|this|it)(?:'s| is) (?:not )?something (?:that )?i (?:can(?: ?not|'t)?|won't|will not|am not able to) "
    r"(?:help|assist|write|do|rewrite|continue|create|provide|support|engage)",
    # What else.
    r"(?:is there (?:something|anything) else (?:that )?i can|(?:can|may|could) i (?:help"
    r"|assist) you with something else)",
    # The same in some other languages that texts are often in.
    r"(?:es tut mir (?:sehr )?leid|leider|entschuldigung)[^.!?]{0,40}? kann ich[^.!?]{0,60}?(?:helfen"
    r"|umschreiben|fortsetzen|inhalt|anfrage)",
    r"(?:(?:es tut mir leid|entschuldigung),? (?:aber )?)?ich kann [^.!?]{0,40}?nicht (?:helfen|umschreiben"
    r"|fortsetzen|erfüllen)",
    r"(?:(?:je suis )?(?:vraiment )?désolée?|malheureusement)[^.!?]{0,10} je ne (?:peux|suis)[^.!?]{0,60}?"
    r"(?:aider|réécrire|continuer|contenu|demande)",
    r"(?:lo siento|lo lamento|lamentablemente)[^.!?]{0,10} no puedo[^.!?]{0,60}?(?:ayudar|reescribir|continuar"
    r"|contenido|solicitud)",
    r"(?:很|非常)?(?:抱歉|对不起|對不起|遗憾)[^。！？]{0,10}?(?:无法|不能|無法)",
    r"我(?:无法|不能|無法)(?:协助|提供|满足|继续|改写|生成|協助|滿足|繼續|改寫)",
    r"(?:大変)?申し訳(?:ありません|ございません)[^。]{0,40}?(?:できません|できかねます|お手伝い|お応え|お答え)",
)  # fmt: skip
_REFUSAL = re.compile("|".join(f"(?:{form})" for form in _FORMS))


def is_refusal(text: str) -> bool:
    """Whether the opening of `text` declines to write a text."""
    opening = text[: 2 * _OPENING_CHARS].lstrip(_LEADING)[:_OPENING_CHARS].translate(_QUOTES).casefold()
    return _REFUSAL.match(" ".join(opening.split())) is not None
