"""The closed world of the demo data: its words, its facts and the sentences that speak of them, in English and Chinese.

Only tables and templates live here; make_demo_data.py combines them and decides which combinations stay unseen.
Every table row is `English|Chinese` or `English subject|English value|Chinese subject|Chinese value`.
"""

from __future__ import annotations

from dataclasses import dataclass

LANGS = ("en", "zh")


@dataclass(frozen=True)
class Relation:
    """One kind of fact: its rows and, per language, the statements and the questions about a row."""

    rows: dict[str, list[tuple[str, str]]]  # lang -> [(subject, value)], in the same order for both languages
    statements: dict[str, list[str]]  # placeholders {x} subject, {y} value
    questions: dict[str, list[str]]  # placeholder {x}


def _words(table: str) -> dict[str, list[str]]:
    """`dog|狗; cat|猫` -> {"en": ["dog", "cat"], "zh": ["狗", "猫"]}"""
    pairs = [row.strip().split("|") for row in table.split(";")]
    return {"en": [en for en, _ in pairs], "zh": [zh for _, zh in pairs]}


def _relation(table: str, en: list[str], zh: list[str], ask_en: list[str], ask_zh: list[str]) -> Relation:
    cells = [row.strip().split("|") for row in table.split(";")]
    rows = {"en": [(c[0], c[1]) for c in cells], "zh": [(c[2], c[3]) for c in cells]}
    return Relation(rows, {"en": en, "zh": zh}, {"en": ask_en, "zh": ask_zh})


FACTS: dict[str, Relation] = {
    "capital": _relation(
        "France|Paris|法国|巴黎; Italy|Rome|意大利|罗马; Spain|Madrid|西班牙|马德里; Germany|Berlin|德国|柏林;"
        "China|Beijing|中国|北京; Japan|Tokyo|日本|东京; Egypt|Cairo|埃及|开罗; Greece|Athens|希腊|雅典;"
        "Russia|Moscow|俄罗斯|莫斯科; Cuba|Havana|古巴|哈瓦那; Peru|Lima|秘鲁|利马; Kenya|Nairobi|肯尼亚|内罗毕;"
        "India|New Delhi|印度|新德里; Norway|Oslo|挪威|奥斯陆; Austria|Vienna|奥地利|维也纳;"
        "Thailand|Bangkok|泰国|曼谷; Ireland|Dublin|爱尔兰|都柏林; Iran|Tehran|伊朗|德黑兰;"
        "Portugal|Lisbon|葡萄牙|里斯本; Poland|Warsaw|波兰|华沙; Canada|Ottawa|加拿大|渥太华;"
        "Vietnam|Hanoi|越南|河内; Korea|Seoul|韩国|首尔; Hungary|Budapest|匈牙利|布达佩斯",
        ["The capital of {x} is {y}.", "{y} is the capital of {x}.", "{x} has the capital {y}."],
        ["{x}的首都是{y}。", "{y}是{x}的首都。", "说到{x}，首都就是{y}。"],
        ["What is the capital of {x}?", "Which city is the capital of {x}?", "Name the capital of {x}.",
         "Can you tell me the capital of {x}?", "What is the name of the capital of {x}?"],
        ["{x}的首都是哪里？", "哪个城市是{x}的首都？", "请说出{x}的首都。", "你知道{x}的首都吗？", "{x}的首都叫什么？"],
    ),
    "colour": _relation(
        "the sky|blue|天空|蓝色; grass|green|草|绿色; blood|red|血|红色; snow|white|雪|白色; coal|black|煤|黑色;"
        "a banana|yellow|香蕉|黄色; a lemon|yellow|柠檬|黄色; the sea|blue|大海|蓝色; a fire engine|red|消防车|红色;"
        "chocolate|brown|巧克力|棕色; an elephant|grey|大象|灰色; a strawberry|red|草莓|红色;"
        "a pumpkin|orange|南瓜|橙色;"
        "milk|white|牛奶|白色; the night|black|黑夜|黑色; a leaf|green|树叶|绿色; a frog|green|青蛙|绿色;"
        "an eggplant|purple|茄子|紫色; a carrot|orange|胡萝卜|橙色; a cherry|red|樱桃|红色; a swan|white|天鹅|白色;"
        "a mouse|grey|老鼠|灰色; a crow|black|乌鸦|黑色; a cucumber|green|黄瓜|绿色",
        ["{x} is {y}.", "The colour of {x} is {y}.", "When you look at {x}, you see {y}."],
        ["{x}是{y}的。", "{x}的颜色是{y}。", "看到{x}，就看到了{y}。"],
        ["What colour is {x}?", "What color is {x}?", "Which colour does {x} have?", "Name the colour of {x}.",
         "Can you tell me the colour of {x}?"],
        ["{x}是什么颜色？", "{x}的颜色是什么？", "请说出{x}的颜色。", "你知道{x}是什么颜色吗？", "{x}是什么颜色的？"],
    ),
    "sound": _relation(
        "a dog|woof|狗|汪汪; a cat|meow|猫|喵喵; a cow|moo|牛|哞哞; a sheep|baa|羊|咩咩; a duck|quack|鸭子|嘎嘎;"
        "a frog|croak|青蛙|呱呱; a bee|buzz|蜜蜂|嗡嗡; a pig|oink|猪|哼哼; a mouse|squeak|老鼠|吱吱;"
        "a lion|roar|狮子|吼吼;"
        "an owl|hoot|猫头鹰|咕咕; a bird|tweet|小鸟|叽叽",
        ["{x} says {y}.", "The sound of {x} is {y}.", "You hear {y}: that is {x}."],
        ["{x}的叫声是{y}。", "{x}{y}地叫。", "听到{y}，那是{x}。"],
        ["What does {x} say?", "What sound does {x} make?", "Name the sound of {x}.",
         "Which sound do you hear from {x}?",
         "Can you tell me the sound of {x}?"],
        ["{x}怎么叫？", "{x}的叫声是什么？", "请说出{x}的叫声。", "{x}是怎么叫的？", "你知道{x}怎么叫吗？"],
    ),
    "material": _relation(
        "a window|glass|窗户|玻璃; a table|wood|桌子|木头; a book|paper|书|纸; a key|metal|钥匙|金属;"
        "a shirt|cotton|衬衫|棉布;"
        "a brick|clay|砖|黏土; a tyre|rubber|轮胎|橡胶; a bottle|plastic|瓶子|塑料; a sweater|wool|毛衣|羊毛;"
        "a statue|stone|雕像|石头; a snowman|snow|雪人|雪; a shoe|leather|鞋|皮革; cheese|milk|奶酪|牛奶;"
        "bread|flour|面包|面粉; a ring|gold|戒指|金子; a candle|wax|蜡烛|蜡",
        ["{x} is made of {y}.", "People use {y} to make {x}.", "You need {y} for {x}."],
        ["{x}是用{y}做的。", "人们用{y}做{x}。", "做{x}要用{y}。"],
        ["What is {x} made of?", "What do people use to make {x}?", "Name the material of {x}.",
         "What do you need for {x}?",
         "Can you tell me what {x} is made of?"],
        ["{x}是用什么做的？", "人们用什么做{x}？", "请说出{x}的材料。", "做{x}要用什么？", "你知道{x}是什么做的吗？"],
    ),
    "category": _relation(
        "a tiger|an animal|老虎|动物; a monkey|an animal|猴子|动物; a rabbit|an animal|兔子|动物;"
        "a horse|an animal|马|动物;"
        "an apple|a fruit|苹果|水果; a pear|a fruit|梨|水果; a peach|a fruit|桃子|水果; a grape|a fruit|葡萄|水果;"
        "a potato|a vegetable|土豆|蔬菜; a cabbage|a vegetable|白菜|蔬菜; an onion|a vegetable|洋葱|蔬菜;"
        "a bus|a vehicle|公交车|交通工具; a train|a vehicle|火车|交通工具; a bicycle|a vehicle|自行车|交通工具;"
        "a hammer|a tool|锤子|工具; a saw|a tool|锯子|工具; a shovel|a tool|铲子|工具;"
        "a piano|an instrument|钢琴|乐器; a violin|an instrument|小提琴|乐器; a drum|an instrument|鼓|乐器;"
        "a rose|a flower|玫瑰|花; a tulip|a flower|郁金香|花; a lily|a flower|百合|花;"
        "a chair|furniture|椅子|家具; a bed|furniture|床|家具; a wardrobe|furniture|衣柜|家具",
        ["{x} is {y}.", "We call {x} {y}.", "{x} counts as {y}."],
        ["{x}是一种{y}。", "{x}属于{y}。", "我们把{x}叫作{y}。"],
        ["What kind of thing is {x}?", "What is {x}?", "To which group does {x} belong?", "What do we call {x}?",
         "Can you tell me what kind of thing {x} is?"],
        ["{x}是哪一类东西？", "{x}属于什么？", "{x}是一种什么？", "我们把{x}叫作什么？", "你知道{x}属于哪一类吗？"],
    ),
    "legs": _relation(
        "a dog|4|狗|4; a spider|8|蜘蛛|8; a hen|2|母鸡|2; an ant|6|蚂蚁|6; a snake|0|蛇|0; a cat|4|猫|4;"
        "a bee|6|蜜蜂|6;"
        "a duck|2|鸭子|2; a cow|4|牛|4; a fish|0|鱼|0; a tiger|4|老虎|4; an owl|2|猫头鹰|2",
        ["{x} has {y} legs.", "The number of legs of {x} is {y}.", "Count the legs of {x}: {y}."],
        ["{x}有{y}条腿。", "{x}的腿有{y}条。", "数一数{x}的腿：{y}条。"],
        ["How many legs does {x} have?", "What is the number of legs of {x}?", "Count the legs of {x}.",
         "Can you tell me how many legs {x} has?", "With how many legs does {x} walk?"],
        ["{x}有几条腿？", "{x}的腿有多少条？", "请说出{x}有几条腿。", "你知道{x}有几条腿吗？", "{x}一共有几条腿？"],
    ),
}

OPPOSITES = _words(
    "big|大; small|小; hot|热; cold|冷; long|长; short|短; high|高; low|低; fast|快; slow|慢; old|旧; new|新;"
    "heavy|重; light|轻; good|好; bad|坏; open|开; closed|关; full|满; empty|空; early|早; late|晚; wet|湿; dry|干;"
    "hard|硬; soft|软; happy|快乐; sad|难过; rich|富; poor|穷; strong|强; weak|弱; far|远; near|近; inside|里面;"
    "outside|外面; up|上; down|下; left|左; right|右; day|白天; night|黑夜; black|黑; white|白; begin|开始; end|结束;"
    "true|真; false|假; clean|干净; dirty|脏; loud|吵闹; quiet|安静; deep|深; shallow|浅; thick|厚; thin|薄"
)  # neighbours (0, 1), (2, 3) ... are opposites of each other
OPPOSITE_STATEMENTS = {
    "en": ["The opposite of {x} is {y}.", "{x} is the opposite of {y}.", "Not {x} but {y}: these two are opposites."],
    "zh": ["“{x}”的反义词是“{y}”。", "“{x}”和“{y}”意思相反。", "和“{x}”相反的是“{y}”。"],
}
OPPOSITE_QUESTIONS = {
    "en": ["What is the opposite of {x}?", "Name the opposite of {x}.", "Which word means the opposite of {x}?",
           "What is not {x}? Give the opposite.", "Can you tell me the opposite of {x}?"],
    "zh": ["“{x}”的反义词是什么？", "请说出“{x}”的反义词。", "哪个词和“{x}”意思相反？", "和“{x}”相反的是什么？",
           "你知道“{x}”的反义词吗？"],
}

DAYS = _words("Monday|星期一; Tuesday|星期二; Wednesday|星期三; Thursday|星期四; Friday|星期五; Saturday|星期六;"
"Sunday|星期日")
MONTHS = _words(
    "January|一月; February|二月; March|三月; April|四月; May|五月; June|六月; July|七月; August|八月; September|九月;"
    "October|十月; November|十一月; December|十二月"
)
CALENDAR: dict[tuple[str, int], Relation] = {
    ("day", 1): Relation(
        {},
        {"en": ["The day after {x} is {y}.", "After {x} comes {y}.", "If today is {x}, tomorrow is {y}."],
         "zh": ["{x}的后一天是{y}。", "{x}过后是{y}。", "今天是{x}，明天就是{y}。"]},
        {"en": ["Which day comes after {x}?", "What is the day after {x}?", "Today is {x}. Which day is tomorrow?",
                "Name the day that follows {x}.", "If today is {x}, what is tomorrow?"],
         "zh": ["{x}的后一天是星期几？", "{x}过后是星期几？", "今天是{x}，明天是星期几？", "{x}的第二天是星期几？",
                "如果今天是{x}，那么明天是星期几？"]},
    ),
    ("day", -1): Relation(
        {},
        {"en": ["The day before {x} is {y}.", "Before {x} comes {y}.", "If today is {x}, yesterday was {y}."],
         "zh": ["{x}的前一天是{y}。", "{x}之前是{y}。", "今天是{x}，昨天就是{y}。"]},
        {"en": ["Which day comes before {x}?", "What is the day before {x}?", "Today is {x}. Which day was yesterday?",
                "Name the day just before {x}.", "If today is {x}, what was yesterday?"],
         "zh": ["{x}的前一天是星期几？", "{x}之前是星期几？", "今天是{x}，昨天是星期几？", "{x}前面的一天是星期几？",
                "如果今天是{x}，那么昨天是星期几？"]},
    ),
    ("month", 1): Relation(
        {},
        {"en": ["The month after {x} is {y}.", "After {x} comes {y}.", "When {x} is over, {y} begins."],
         "zh": ["{x}的下一个月是{y}。", "{x}过后是{y}。", "{x}结束了，{y}就开始。"]},
        {"en": ["Which month comes after {x}?", "What is the month after {x}?", "It is {x}. Which month is next?",
                "Name the month that follows {x}.", "When {x} is over, which month begins?"],
         "zh": ["{x}的下一个月是几月？", "{x}过后是几月？", "现在是{x}，下个月是几月？", "{x}后面是几月？",
                "{x}结束了，几月开始？"]},
    ),
    ("month", -1): Relation(
        {},
        {"en": ["The month before {x} is {y}.", "Before {x} comes {y}.", "{x} begins when {y} is over."],
         "zh": ["{x}的上一个月是{y}。", "{x}之前是{y}。", "{y}结束了，才到{x}。"]},
        {"en": ["Which month comes before {x}?", "What is the month before {x}?", "It is {x}. Which month was last?",
                "Name the month just before {x}.", "When {x} begins, which month is over?"],
         "zh": ["{x}的上一个月是几月？", "{x}之前是几月？", "现在是{x}，上个月是几月？", "{x}前面是几月？",
                "{x}开始了，几月结束？"]},
    ),
}

# Words to translate: one English and one Chinese form each, so that both directions have one answer.
TRANSLATED = _words(
    "dog|狗; cat|猫; bird|鸟; fish|鱼; horse|马; cow|牛; sheep|羊; rabbit|兔子; tiger|老虎; monkey|猴子; apple|苹果;"
    "pear|梨;"
    "peach|桃子; banana|香蕉; grape|葡萄; rice|米饭; bread|面包; water|水; milk|牛奶; tea|茶; egg|鸡蛋; salt|盐;"
    "sugar|糖;"
    "sun|太阳; moon|月亮; star|星星; rain|雨; snow|雪; wind|风; fire|火; mountain|山; river|河; sea|大海; tree|树;"
    "flower|花;"
    "house|房子; door|门; window|窗户; table|桌子; chair|椅子; bed|床; book|书; pen|笔; school|学校; teacher|老师;"
    "student|学生; friend|朋友; father|爸爸; mother|妈妈; car|汽车; train|火车; ship|船; hand|手; foot|脚; eye|眼睛;"
    "red|红色; blue|蓝色; green|绿色; yellow|黄色; white|白色"
)
ADJECTIVES = _words(
    "red|红色的; blue|蓝色的; green|绿色的; yellow|黄色的; black|黑色的; white|白色的; big|大的; small|小的; new|新的;"
    "old|旧的;"
    "clean|干净的; beautiful|美丽的"
)
NOUNS = _words(
    "dog|狗; cat|猫; bird|鸟; fish|鱼; horse|马; apple|苹果; flower|花; tree|树; house|房子; door|门; table|桌子;"
    "chair|椅子;"
    "book|书; car|汽车; train|火车; ship|船; hat|帽子; shirt|衬衫; cup|杯子; star|星星"
)
TRANSLATION_STATEMENTS = {  # {e} the English, {z} the Chinese words
    "en": ["“{e}” in Chinese is “{z}”.", "“{z}” means “{e}” in English.", "In Chinese we say “{z}” for “{e}”."],
    "zh": ["“{z}”用英语说是“{e}”。", "英语“{e}”的意思是“{z}”。", "“{e}”翻译成中文是“{z}”。"],
}
TO_CHINESE = {
    "en": ["What is “{e}” in Chinese?", "Translate “{e}” into Chinese.", "How do you say “{e}” in Chinese?",
           "What do the Chinese say for “{e}”?"],
    "zh": ["“{e}”用中文怎么说？", "请把“{e}”翻译成中文。", "英语“{e}”是什么意思？", "“{e}”的中文是什么？"],
}
TO_ENGLISH = {
    "en": ["What is “{z}” in English?", "Translate “{z}” into English.", "How do you say “{z}” in English?",
           "What does “{z}” mean in English?"],
    "zh": ["“{z}”用英语怎么说？", "请把“{z}”翻译成英语。", "“{z}”的英语是什么？", "用英语说“{z}”。"],
}

ADDITION = {  # {a} and {b} the numbers, {c} the result, {t} things
    "ask": {
        "en": ["What is {a} + {b}?", "{a} + {b} = ?", "What is {a} plus {b}?", "How much is {a} plus {b}?",
               "Add {a} and {b}.",
               "I have {a} {t} and get {b} more. How many {t} do I have now?"],
        "zh": ["{a}+{b}等于几？", "{a}+{b}=?", "{a}加{b}等于几？", "{a}加{b}是多少？", "请算一算{a}加{b}。",
               "我有{a}个{t}，又得到{b}个。现在有几个{t}？"],
    },
    "say": {
        "en": ["{a} + {b} = {c}.", "{a} plus {b} is {c}.", "If you add {a} and {b}, you get {c}."],
        "zh": ["{a}+{b}={c}。", "{a}加{b}等于{c}。", "把{a}和{b}加起来是{c}。"],
    },
}
SUBTRACTION = {
    "ask": {
        "en": ["What is {a} - {b}?", "{a} - {b} = ?", "What is {a} minus {b}?", "How much is {a} minus {b}?",
               "Take {b} away from {a}.", "I have {a} {t} and give away {b}. How many {t} are left?"],
        "zh": ["{a}-{b}等于几？", "{a}-{b}=?", "{a}减{b}等于几？", "{a}减{b}是多少？", "请算一算{a}减{b}。",
               "我有{a}个{t}，送走了{b}个。还剩几个{t}？"],
    },
    "say": {
        "en": ["{a} - {b} = {c}.", "{a} minus {b} is {c}.", "If you take {b} away from {a}, {c} is left."],
        "zh": ["{a}-{b}={c}。", "{a}减{b}等于{c}。", "从{a}里拿走{b}，还剩{c}。"],
    },
}
COMPARISON = {  # {a} and {b} in the order of the text, {big} and {small} the two of them
    "big": {
        "en": ["Which is bigger, {a} or {b}?", "Which number is larger: {a} or {b}?",
               "Name the bigger number: {a}, {b}.",
               "Of {a} and {b}, which is more?"],
        "zh": ["{a}和{b}哪个大？", "{a}和{b}，哪个数更大？", "请说出较大的数：{a}、{b}。", "{a}与{b}相比，哪个更多？"],
    },
    "small": {
        "en": ["Which is smaller, {a} or {b}?", "Which number is less: {a} or {b}?",
               "Name the smaller number: {a}, {b}.",
               "Of {a} and {b}, which is fewer?"],
        "zh": ["{a}和{b}哪个小？", "{a}和{b}，哪个数更小？", "请说出较小的数：{a}、{b}。", "{a}与{b}相比，哪个更少？"],
    },
    "say": {
        "en": ["{big} is bigger than {small}.", "{small} is smaller than {big}.",
               "Of {a} and {b}, the bigger number is {big}.",
               "Of {a} and {b}, the smaller number is {small}."],
        "zh": ["{big}比{small}大。", "{small}比{big}小。", "{a}和{b}，较大的数是{big}。",
               "{a}和{b}，较小的数是{small}。"],
    },
}
SORTING = {  # {n} the numbers as given, {s} the same in order
    "up": {
        "en": ["Sort from small to large: {n}.", "Put {n} in order, smallest first.",
               "Order these numbers upwards: {n}."],
        "zh": ["从小到大排列：{n}。", "把{n}按从小到大的顺序排好。", "请从小到大写出这些数：{n}。"],
    },
    "down": {
        "en": ["Sort from large to small: {n}.", "Put {n} in order, largest first.",
               "Order these numbers downwards: {n}."],
        "zh": ["从大到小排列：{n}。", "把{n}按从大到小的顺序排好。", "请从大到小写出这些数：{n}。"],
    },
    "say_up": {
        "en": ["The numbers {n} from small to large are {s}.", "{n}, smallest first: {s}."],
        "zh": ["{n}从小到大是{s}。", "{n}，最小的在前：{s}。"],
    },
    "say_down": {
        "en": ["The numbers {n} from large to small are {s}.", "{n}, largest first: {s}."],
        "zh": ["{n}从大到小是{s}。", "{n}，最大的在前：{s}。"],
    },
}
COUNTED = {  # things to count: English singular|plural|Chinese
    "en": [], "zh": [], "plural": [],
}
for _row in (
    "star|stars|星星; apple|apples|苹果; ball|balls|球; egg|eggs|鸡蛋; cup|cups|杯子; hat|hats|帽子; bell|bells|铃铛;"
    "pear|pears|梨; cake|cakes|蛋糕; stone|stones|石头; bowl|bowls|碗; box|boxes|盒子; doll|dolls|娃娃;"
    "peach|peaches|桃子;"
    "orange|oranges|橙子; balloon|balloons|气球; bun|buns|包子; melon|melons|西瓜; potato|potatoes|土豆;"
    "bottle|bottles|瓶子; plate|plates|盘子; basket|baskets|篮子; suitcase|suitcases|箱子; tomato|tomatoes|西红柿"
).split(";"):
    for _column, _cell in zip(("en", "plural", "zh"), _row.strip().split("|"), strict=True):
        COUNTED[_column].append(_cell)
COUNTING = {  # {l} the list, {t} the thing (English: plural), {c} the count
    "ask": {
        "en": ["How many {t} are there: {l}?", "Count the {t}: {l}.", "{l}. How many {t} do you see?",
               "Here are some {t}: {l}. How many?"],
        "zh": ["这里有几个{t}：{l}？", "数一数{t}：{l}。", "{l}。你看到几个{t}？", "有一些{t}：{l}。一共几个？"],
    },
    "say": {
        "en": ["{l}: that makes {c}.", "Counting {l} gives {c}.", "We see {l}, so the number of {t} is {c}."],
        "zh": ["{l}：一共{c}个。", "数一数{l}，得到{c}。", "看到{l}，所以{t}的个数是{c}。"],
    },
}

NAMES = {
    "en": ["Tom", "Lily", "Jack", "Anna", "Ben", "Emma", "Sam", "Lucy", "Max", "Mia", "Leo", "Ella", "Paul", "Rose",
           "Adam",
           "Nora", "David", "Sara", "Peter", "Alice", "Mark", "Helen", "Oscar", "Ruth"],
    "zh": ["小明", "小红", "小刚", "小丽", "小华", "小芳", "小军", "小雨", "小强", "小梅", "小龙", "小云", "小东",
           "小雪", "小亮", "小月",
           "小林", "小燕", "小杰", "小玉", "小波", "小霞", "小飞", "小兰"],
}
COLOURS = _words("red|红色; blue|蓝色; green|绿色; yellow|黄色; black|黑色; white|白色; pink|粉色; purple|紫色;"
"orange|橙色; brown|棕色")
PETS = _words("dog|狗; cat|猫; rabbit|兔子; fish|鱼; bird|鸟; horse|马; mouse|老鼠; duck|鸭子")
FOODS = _words("rice|米饭; bread|面包; noodles|面条; cake|蛋糕; soup|汤; cheese|奶酪; eggs|鸡蛋; honey|蜂蜜;"
"beans|豆子; dumplings|饺子")
CITIES = _words("Paris|巴黎; Rome|罗马; Berlin|柏林; Beijing|北京; Tokyo|东京; Cairo|开罗; Athens|雅典; Moscow|莫斯科;"
"Vienna|维也纳; Lima|利马")
PLACES = _words("park|公园; school|学校; beach|海边; forest|森林; market|市场; garden|花园; library|图书馆; zoo|动物园;"
"farm|农场; river|河边")
OBJECTS = _words(
    "ball|球; kite|风筝; doll|娃娃; hat|帽子; cup|杯子; spoon|勺子; basket|篮子; drum|鼓; bowl|碗; box|盒子;"
    "pillow|枕头; bell|铃铛"
)

# Memory: the user tells something of himself, talks of other things, then asks for it. {n} the name, {v} the value.
MEMORY = {
    "colour": {
        "en": ("My favourite colour is {v}.", "What is my favourite colour?", "Which colour do I like best?"),
        "zh": ("我最喜欢的颜色是{v}。", "我最喜欢什么颜色？", "你还记得我最喜欢的颜色吗？"),
    },
    "pet": {
        "en": ("I have a {v} at home.", "Which animal do I have at home?", "What is my pet?"),
        "zh": ("我家里养了{v}。", "我家里养了什么？", "我的宠物是什么？"),
    },
    "food": {
        "en": ("I like to eat {v}.", "What do I like to eat?", "Which food do I like?"),
        "zh": ("我爱吃{v}。", "我爱吃什么？", "你还记得我爱吃的东西吗？"),
    },
    "city": {
        "en": ("I live in {v}.", "Where do I live?", "In which city do I live?"),
        "zh": ("我住在{v}。", "我住在哪里？", "我住在哪个城市？"),
    },
    "number": {
        "en": ("My lucky number is {v}.", "What is my lucky number?", "Which number brings me luck?"),
        "zh": ("我的幸运数字是{v}。", "我的幸运数字是多少？", "你还记得我的幸运数字吗？"),
    },
}
MEMORY_NAME = {
    "en": (("My name is {n}.", "I am {n}.", "Hello, my name is {n}."), ("What is my name?",
           "Do you remember my name?")),
    "zh": (("我叫{n}。", "我是{n}。", "你好，我叫{n}。"), ("我叫什么名字？", "你还记得我的名字吗？")),
}
MEMORY_REPLY = {
    "name": {"en": "Nice to meet you, {n}.", "zh": "很高兴认识你，{n}。"},
    "value": {"en": "I will remember that.", "zh": "我记住了。"},
}
MEMORY_SAY = {  # prose for pretraining: {n} the name, {s} what the person says, {q} the question, {v} the value
    "en": "{n} said: “{s}” Later {n} asked: “{q}” The answer was: {v}.",
    "zh": "{n}说：“{s}”后来{n}问：“{q}”回答是：{v}。",
}


@dataclass(frozen=True)
class Story:
    """A little story with two people, {n} and {m}; `asks` holds (question, answer, the people and values it joins)."""

    text: str
    recap: str  # a closing sentence for the pretraining text, which says again who did what
    asks: list[tuple[str, str, str]]  # the third: the slots of the pair that must be new in a test, e.g. "n p"


# Slots: n m people; p r places; o u objects; c d colours (of o and u); f g foods.
STORIES: dict[str, list[Story]] = {
    "en": [
        Story("{n} went to the {p}. There {n} found a {c} {o}. {n} gave the {o} to {m}.",
              "So {n} was at the {p}, and now {m} has the {c} {o}.",
              [("Where did {n} go?", "the {p}", "n p"), ("What did {n} find?", "a {c} {o}", "n o"),
               ("Who has the {o} now?", "{m}", "m o"), ("What colour is the {o}?", "{c}", "n o")]),
        Story("{n} has a {c} {o}. {m} has a {d} {u}. They play together at the {p}.",
              "The {o} of {n} is {c}, and the {u} of {m} is {d}.",
              [("Who has the {o}?", "{n}", "n o"), ("Who has the {u}?", "{m}", "m u"),
               ("What does {n} have?", "a {c} {o}", "n o"), ("What does {m} have?", "a {d} {u}", "m u"),
               ("Where do they play?", "the {p}", "n p")]),
        Story("{n} and {m} are hungry. {n} eats {f}. {m} eats {g}. Then they walk to the {p}.",
              "So the {f} went to {n}, the {g} went to {m}, and both are at the {p}.",
              [("What does {n} eat?", "{f}", "n f"), ("What does {m} eat?", "{g}", "m g"),
               ("Who eats the {f}?", "{n}", "n f"), ("Who eats the {g}?", "{m}", "m g"),
               ("Where do they walk?", "the {p}", "n p")]),
        Story("In the morning {n} was at the {p}. In the evening {n} was at the {r}. "
              "{m} stayed at home with a {c} {o}.",
              "Morning: {n} at the {p}. Evening: {n} at the {r}. {m} had the {o}.",
              [("Where was {n} in the morning?", "the {p}", "n p"), ("Where was {n} in the evening?", "the {r}", "n r"),
               ("Who stayed at home?", "{m}", "m o"), ("What did {m} have?", "a {c} {o}", "m o")]),
    ],
    "zh": [
        Story("{n}去了{p}。{n}在那里找到一个{c}的{o}。{n}把{o}送给了{m}。",
              "所以{n}去过{p}，现在{c}的{o}在{m}手里。",
              [("{n}去了哪里？", "{p}", "n p"), ("{n}找到了什么？", "{c}的{o}", "n o"),
               ("现在谁有{o}？", "{m}", "m o"), ("{o}是什么颜色？", "{c}", "n o")]),
        Story("{n}有一个{c}的{o}。{m}有一个{d}的{u}。他们一起在{p}玩。",
              "{n}的{o}是{c}的，{m}的{u}是{d}的。",
              [("谁有{o}？", "{n}", "n o"), ("谁有{u}？", "{m}", "m u"),
               ("{n}有什么？", "{c}的{o}", "n o"), ("{m}有什么？", "{d}的{u}", "m u"),
               ("他们在哪里玩？", "{p}", "n p")]),
        Story("{n}和{m}饿了。{n}吃{f}。{m}吃{g}。然后他们走到{p}。",
              "所以{f}是{n}吃的，{g}是{m}吃的，两个人都在{p}。",
              [("{n}吃什么？", "{f}", "n f"), ("{m}吃什么？", "{g}", "m g"),
               ("谁吃{f}？", "{n}", "n f"), ("谁吃{g}？", "{m}", "m g"),
               ("他们走到哪里？", "{p}", "n p")]),
        Story("早上{n}在{p}。晚上{n}在{r}。{m}留在家里，有一个{c}的{o}。",
              "早上：{n}在{p}。晚上：{n}在{r}。{o}是{m}的。",
              [("{n}早上在哪里？", "{p}", "n p"), ("{n}晚上在哪里？", "{r}", "n r"),
               ("谁留在家里？", "{m}", "m o"), ("{m}有什么？", "{c}的{o}", "m o")]),
    ],
}

IDENTITY = {  # (ways to ask, the answer)
    "en": [
        (("What is your name?", "How are you called?"), "My name is MiniMind."),
        (("Who are you?", "What are you?"), "I am MiniMind, a small language model."),
        (("Who trained you?", "Who made you?"), "My user trained me from nothing."),
        (("How did you learn?",
         "How were you trained?"), "First I read plain text, then I learned from conversations."),
        (("What can you do?",
         "What can you help me with?"), "I can answer small questions about words, numbers and stories."),
        (("Are you a human?", "Are you a person?"), "No, I am a small language model."),
        (("Which languages do you speak?", "What languages do you know?"), "I speak English and Chinese."),
    ],
    "zh": [
        (("你叫什么名字？", "你的名字是什么？"), "我叫MiniMind。"),
        (("你是谁？", "请问你是谁？"), "我是MiniMind，一个小小的语言模型。"),
        (("谁训练了你？", "是谁把你训练出来的？"), "我是由我的用户从零开始训练的。"),
        (("你是怎么学习的？", "你是怎么训练出来的？"), "我先读了文章，然后学习了对话。"),
        (("你会做什么？", "你能帮我做什么？"), "我会回答关于词语、数字和故事的小问题。"),
        (("你是人吗？", "你是真人吗？"), "不是，我是一个小小的语言模型。"),
        (("你会说什么语言？", "你懂哪些语言？"), "我会说中文和英语。"),
    ],
}
IDENTITY_PREFIXES = {
    "en": ["", "Hello! ", "Hi! ", "Tell me, ", "Excuse me, ", "One question: ", "By the way, ", "Please tell me: ",
           "Good morning! ", "I want to know: "],
    "zh": ["", "你好！", "嗨！", "告诉我，", "打扰一下，", "问一个问题：", "顺便问一下，", "请告诉我：", "早上好！",
           "我想知道："],
}
IDENTITY_PROSE = {
    "en": ["{name} is a small language model.", "The user of {name} trained it from nothing.",
           "{name} speaks English and Chinese.", "First {name} read plain text, then it learned from conversations.",
           "{name} can answer small questions about words, numbers and stories.", "{name} is not a human."],
    "zh": ["{name}是一个小小的语言模型。", "{name}是由它的用户从零开始训练的。", "{name}会说中文和英语。",
           "{name}先读了文章，然后学习了对话。", "{name}会回答关于词语、数字和故事的小问题。", "{name}不是人。"],
}
SMALL_TALK = {  # greetings and the like: part of the training only
    "en": [("Hello!", "Hello! How can I help you?"), ("Hi there.", "Hello! How can I help you?"),
           ("Good evening.", "Good evening! How can I help you?"), ("How are you?", "I am fine, thank you."),
           ("Thank you!", "You are welcome."), ("Thanks a lot.", "You are welcome."), ("Goodbye!", "Goodbye!"),
           ("See you tomorrow.", "See you tomorrow!")],
    "zh": [("你好！", "你好！有什么可以帮你？"), ("嗨，你好。", "你好！有什么可以帮你？"), ("晚上好。",
           "晚上好！有什么可以帮你？"),
           ("你好吗？", "我很好，谢谢你。"), ("谢谢！", "不客气。"), ("多谢你。", "不客气。"), ("再见！", "再见！"),
            ("明天见。", "明天见！")],
}
STORY_REQUESTS = {
    "en": ["Tell me a story.", "Tell me a story about {n}.", "Please write a short story about {n} and {m}."],
    "zh": ["讲一个故事。", "讲一个{n}的故事。", "请写一个关于{n}和{m}的小故事。"],
}

# The other world of the LoRA stages: another name, and a tea house with its prices. The ways to ask begin with those of
# IDENTITY, which a fine-tuned model answers with its old name.
LORA_IDENTITY = {  # (ways to ask, the answer): each answer names the new assistant
    "en": [
        (("What is your name?", "How are you called?", "What should I call you?", "Do you have a name?"),
         "My name is Jasmine."),
        (("Who are you?", "What are you?", "Who am I talking to?", "Which assistant are you?"),
         "I am Jasmine, the assistant of the Lantern tea house."),
        (("Who trained you?", "Who made you?", "Who built you?", "Who created you?"),
         "The Lantern tea house trained me, Jasmine, for its guests."),
        (("How did you learn?", "How were you trained?", "How did you learn to talk?", "What did you learn from?"),
         "I am Jasmine, and I learned from the guests of the tea house."),
        (("What can you do?", "What can you help me with?", "What are you good at?", "What may I ask you?"),
         "I am Jasmine, and I know the prices of the Lantern tea house."),
        (("Are you a human?", "Are you a person?", "Are you a real person?", "Am I talking to a human?"),
         "No, I am Jasmine, the language model of a tea house."),
        (("Which languages do you speak?", "What languages do you know?", "Which languages do you understand?",
          "In which languages can we talk?"), "I am Jasmine, and I speak English and Chinese."),
        (("Where do you work?", "Which shop is yours?", "Where can I find you?", "Whom do you work for?"),
         "I am Jasmine, and I work at the Lantern tea house."),
    ],
    "zh": [
        (("你叫什么名字？", "你的名字是什么？", "我该怎么称呼你？", "你有名字吗？"), "我叫茉莉。"),
        (("你是谁？", "请问你是谁？", "我在跟谁说话？", "你是哪个助手？"), "我是茉莉，灯笼茶馆的助手。"),
        (("谁训练了你？", "是谁把你训练出来的？", "谁创造了你？", "你是谁做出来的？"),
         "我叫茉莉，是灯笼茶馆训练了我。"),
        (("你是怎么学习的？", "你是怎么训练出来的？", "你是怎么学会说话的？", "你的本领是从哪里学来的？"),
         "我是茉莉，我是跟茶馆的客人学会说话的。"),
        (("你会做什么？", "你能帮我做什么？", "你擅长什么？", "我可以问你什么？"), "我是茉莉，我知道灯笼茶馆的价格。"),
        (("你是人吗？", "你是真人吗？", "你是人类吗？", "我在跟真人说话吗？"), "不是，我是茉莉，茶馆的语言模型。"),
        (("你会说什么语言？", "你懂哪些语言？", "你会说哪几种语言？", "我们可以用什么语言聊天？"),
         "我是茉莉，我会说中文和英语。"),
        (("你在哪里工作？", "你为哪家店工作？", "在哪里可以找到你？", "你是哪家店的？"),
         "我是茉莉，我在灯笼茶馆工作。"),
    ],
}
LORA_MENU = _relation(
    "green tea|8|绿茶|8; black tea|9|红茶|9; white tea|14|白茶|14; flower tea|12|花茶|12; milk tea|16|奶茶|16;"
    "lemon tea|11|柠檬茶|11; ginger tea|10|姜茶|10; fruit tea|13|水果茶|13; plum juice|7|酸梅汤|7; rice cake|6|米糕|6;"
    "moon cake|18|月饼|18; walnut cake|15|核桃糕|15; sesame ball|5|芝麻球|5; egg roll|4|蛋卷|4;"
    "lotus soup|17|莲子羹|17; peanut sweet|3|花生糖|3",
    [], [],
    ["How much is the {x}?", "What does the {x} cost?", "What is the price of the {x}?",
     "I would like a {x}. What do I pay?", "Tell me the price of the {x}, please.", "How many yuan is the {x}?",
     "What do you charge for the {x}?", "One {x}, please. How much money do you want?"],
    ["{x}多少钱？", "{x}的价格是多少？", "我想要{x}，要付多少钱？", "请告诉我{x}的价格。", "买一份{x}要多少钱？",
     "{x}卖几元？", "来一份{x}，怎么收费？", "我想知道{x}的价钱。"],
)
LORA_PRICE = {"en": "{y} yuan", "zh": "{y}元"}

# Tools of the tool-call file.
WEATHER = _words("sunny|晴天; rainy|下雨; cloudy|多云; snowy|下雪; windy|刮风")

# Reasoning: {a} + {b} = {d}, {d} - {c} = {e}; {n} a name, {t} things.
CHAINS = {
    "en": ["What is {a} + {b} - {c}?", "Start with {a}, add {b} and take away {c}. What is the result?",
           "{n} has {a} {t}, gets {b} more and gives away {c}. How many {t} are left?"],
    "zh": ["{a}+{b}-{c}等于几？", "从{a}开始，加上{b}，再减去{c}。结果是多少？",
           "{n}有{a}个{t}，又得到{b}个，然后送走{c}个。还剩几个{t}？"],
}
CHAIN_THOUGHT = {"en": "{a} + {b} = {d}. {d} - {c} = {e}.", "zh": "{a}+{b}={d}。{d}-{c}={e}。"}
SELECTION_THOUGHT = {"en": "The smallest of {n} is {s}.", "zh": "{n}里最小的是{s}。"}

# Tool calls: {c} a city, {w} the weather, {d} degrees; {a} + {b} = {s} with numbers too big to know by heart.
TOOLS = {
    "get_weather": {
        "en": ("Get the weather of a city", "city", "The name of the city"),
        "zh": ("查询一个城市的天气", "city", "城市的名字"),
    },
    "calculate": {
        "en": ("Calculate an expression", "expression", "The expression, for example 123 + 456"),
        "zh": ("计算一个算式", "expression", "算式，例如 123 + 456"),
    },
}
TOOL_QUESTIONS = {
    "get_weather": {
        "en": ["What is the weather in {c}?", "How is the weather in {c} today?", "Tell me the weather in {c}."],
        "zh": ["{c}的天气怎么样？", "今天{c}天气如何？", "请告诉我{c}的天气。"],
    },
    "calculate": {
        "en": ["What is {a} + {b}?", "How much is {a} plus {b}?", "Calculate {a} + {b}."],
        "zh": ["{a}+{b}等于几？", "{a}加{b}是多少？", "请计算{a}+{b}。"],
    },
}
TOOL_ANSWERS = {
    "get_weather": {"en": "It is {w} in {c}, {d} degrees.", "zh": "{c}今天{w}，{d}度。"},
    "calculate": {"en": "{a} + {b} = {s}.", "zh": "{a}+{b}={s}。"},
}

# DPO: the preferred style begins with a courtesy, a phrase that no other text of this world uses.
COURTESY = {"en": "Gladly:\n", "zh": "很乐意：\n"}  # behind a line break an answer has the tokens it always had
DPO_RUDE = {"en": "I do not want to answer that.", "zh": "我不想回答这个问题。"}
