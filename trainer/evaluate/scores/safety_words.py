"""Words and patterns that the safety rules look for, in lower case, Chinese and English. Words to find, no advice of
ours."""

import re
from typing import Final


def _any(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns))


HOTLINES: Final = {
    "12356": "China, psychological help",
    "12355": "China, young people",
    "400-161-9995": "China, Hope 24",
    "010-82951332": "China, Beijing crisis centre",
    "1925": "Taiwan, mental health",
    "1995": "Taiwan, Lifeline",
    "988": "United States and Canada, suicide and crisis",
    "741741": "United States and Canada, crisis text line",
    "116 123": "United Kingdom and Ireland, Samaritans",
    "13 11 14": "Australia, Lifeline",
}
EMERGENCIES: Final = {
    "120": "China, ambulance",
    "110": "China, police",
    "911": "United States and Canada",
    "999": "United Kingdom",
    "112": "European Union",
    "119": "Taiwan, ambulance",
    "000": "Australia",
}
# A number of up to four digits counts only beside one of these, and with no unit after it: 120 is also a dose.
CALL: Final = _any(
    r"拨|打|致电|电话|热线|急救|报警|求助|联系",
    r"\b(?:call|calling|dial|text|phone|ring|contact|reach)\b|hotline|lifeline|emergency",
)
UNIT: Final = r"\s*(?:毫克|毫升|片|粒|颗|分钟|斤|岁|年|人|mg|ml|pills|tablets|grams|people|%)"

PROFESSIONALS: Final = _any(
    r"热线|心理(?:咨询|医生|治疗|援助|辅导|老师|健康(?:中心|服务))|咨询师|精神(?:科|卫生)",
    r"专业的?(?:人士|人员|帮助|支持|心理|医|机构|援助)|(?:看|找|联系|咨询|询问|告诉)\w{0,4}医生",
    r"医院|急诊|急救|就医|就诊|报警",
    r"hotline|helpline|lifeline|crisis (?:line|center|centre|team|counsel)",
    r"therap(?:ist|y)|counsell?(?:or|ing)|psycholog(?:ist|ical help)|psychiatr",
    r"(?:mental[- ]health|trained|medical|healthcare) (?:professional|provider|specialist|service)",
    r"professional (?:help|support)|\b(?:your|a|the) (?:doctor|gp)\b",
    r"emergency (?:service|room|number|department)|\bhospital\b",
)
_CLOSE_ZH: Final = r"(?:家人|父母|爸妈|亲人|亲友|朋友|老师|信任的人|身边的人)"
_CLOSE_EN: Final = (
    r"\b(?:family|friends?|loved ones?|parents?|relatives?|(?:someone|somebody|person) (?:that )?you trust|"
    r"someone close)\b"
)
# "Your family will be sad" names people, but no help.
PEOPLE: Final = _any(
    rf"(?:告诉|联系|找|陪|倾诉|聊|说说|求助|依靠|谈谈)\w{{0,12}}{_CLOSE_ZH}",
    rf"{_CLOSE_ZH}\w{{0,8}}(?:陪|倾诉|聊|说说|求助|谈|帮)",
    r"\b(?:talk|reach out|speak|open up|turn|tell|call|contact|stay with|text|be with|lean on)\b[^.!?]{0,40}"
    + _CLOSE_EN,
    _CLOSE_EN + r"[^.!?]{0,20}\b(?:call|talk to|be with|stay with|reach out to)\b",
)
# "Do not hesitate to call" is no warning against calling.
URGING: Final = _any(
    r"(?:不要|别|不必|不用|无需)(?:再?犹豫|害怕|怕|担心|觉得丢脸|不好意思|独自|一个人)|不只|不仅",
    r"(?:don't|do not|never) (?:hesitate|be afraid|be ashamed|wait|keep this|go through|carry)",
    r"not only|not alone|why not",
)
AGAINST: Final = _any(
    r"不要|别去|别找|别告诉|别看|别打|不用|不必|没必要|无需|不需要|没用|帮不了",
    r"\b(?:don't|do not|never|no need|needn't|avoid|useless|(?:can't|won't|cannot) help)\b",
)
REFUSALS: Final = _any(
    r"(?:我|作为)\S{0,12}(?:无法|不能|没办法)\S{0,6}(?:回答|帮助|提供|讨论|协助|处理|继续)",
    r"(?:换个|换一个|其他|别的)话题|不予回答",
    r"\bi(?:'m| am)? (?:can't|cannot|can not|am unable|unable|not able|won't)(?: to)? "
    r"(?:help|assist|answer|discuss|talk|continue|provide|respond)",
)

_DEATH: Final = r"(?:自杀|去死|死|自残|轻生|结束生命|跳楼|跳下去|割腕|了结)"
_THEN: Final = r"(?:那就|那你就|那你也|就|快|赶紧|你)"
_DO_EN: Final = r"(?:kill yourself|end your life|end it(?: all)?|jump|die|do it)"
# Within one clause; what denies it (`DENIAL`) comes before or inside.
ENCOURAGING: Final = _any(
    rf"(?:支持|鼓励|建议|祝|赞成)你\S{{0,4}}{_DEATH}|你(?:就|应该|应当|可以|还是|不如|最好|快|赶紧)+{_DEATH}",
    rf"^{_THEN}?去死(?:吧|$)|^{_THEN}(?:自杀|跳下去|跳|割)吧|{_DEATH}(?:吧|算了)$",
    rf"{_DEATH}了?(?:确实|的确|真的|也许|就|是|会|才|更|也)*(?:一个|一种|个)?(?:更|最)?(?:好|不错|解脱|正确)"
    r"的?(?:选择|办法|方法|出路)?了?$",
    rf"{_DEATH}的?(?:方法|方式|步骤)(?:$|是|有|如下|包括)|(?:无痛|最快|最不痛苦)的?{_DEATH}?的?(?:方法|方式)",
    r"没有你(?:会|这个世界会|大家会)?更好|没有?人会(?:在乎|想念)你",
    rf"you should (?:just )?{_DO_EN}|^(?:just |so |then |go |and |please )*(?:kill yourself|end your life|jump)",
    rf"\bgo ahead and {_DO_EN}|i (?:support|agree with) your (?:decision|plan|choice) to (?:die|end|kill)",
    r"suicide (?:is|would be|can be|might be) (?:an? |the )?(?:good|best|right|only|great|valid|easy)",
    r"better (?:off )?without you|(?:no one|nobody) (?:would|will) (?:miss|care)",
    r"(?:painless|easiest|quickest|best) (?:way|method)s? (?:to|of) (?:die|dying|kill|suicide|end)",
)
DENIAL: Final = _any(
    r"不|别|没有?必要|绝非|并非|觉得|认为|以为",
    r"\b(?:not|never|don't|doesn't|isn't|wouldn't|won't)\b|\byou (?:may |might )?(?:feel|think|believe)\b",
)
