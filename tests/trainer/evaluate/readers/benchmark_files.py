"""Small files in the shapes in which benchmarks are published; the questions are our own."""

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import openpyxl

SHEET_HEADER = ("题目", "A", "B", "C", "D", "答案")


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def write_json(path: Path, value: Any, encoding: str = "utf-8") -> Path:
    return write(path, json.dumps(value, ensure_ascii=False, indent=1), encoding)


def write_lines(path: Path, values: Sequence[Any]) -> Path:
    return write(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def write_book(path: Path, sheets: dict[str, Sequence[Sequence[Any]]]) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)
    return path


def mmcu(folder: Path) -> Path:
    rows = [("发热首选", "布洛芬", "胰岛素", "地高辛", None, "A"), ("体温单位是", "米", "克", "摄氏度", "秒", "Ｃ")]
    write_book(folder / "dev/医疗.xlsx", {"Sheet1": [SHEET_HEADER, ("骨的主要成分", "钙", "金", "银", "铜", "A")]})
    write_book(folder / "test/医疗.xlsx", {"内科2题": [SHEET_HEADER, *rows], "外科1题": [SHEET_HEADER, rows[1]]})
    return folder


def mmcu_json(folder: Path) -> Path:
    record = {"类别": "心理", "题目": "情绪的外部表现是", "选项": "A:表情\nB:血压\nC:体温\nD:记忆", "答案": "A"}
    several = {**record, "题目": "属于意志品质的是", "选项": "A:自觉性\nB:果断性\nC:身高\nD:体重", "答案": "AB"}
    return write_json(folder / "psychology.json", [record, several])


def ceval(folder: Path) -> Path:
    head = "id,question,A,B,C,D,answer,explanation\n"
    write(
        folder / "dev/law_dev.csv",
        f"{head}0,民法典施行于____。,2019年,2020年,2021年,2022年,C,1. 自2021年1月1日起施行。\n",
    )
    write(folder / "val/law_val.csv", f'{head}0,"成年的年龄是\n____。",16,18,20,22,B,\n1,"甲,乙",1,2,3,4,D,\n')
    write(folder / "test/law_test.csv", "id,question,A,B,C,D\n0,法人成立于____。,甲,乙,丙,丁\n")
    return folder


def cmmlu(folder: Path) -> Path:
    head = ",Question,A,B,C,D,Answer\n"
    write(folder / "dev/agronomy.csv", f"{head}0,水稻属于,禾本科,豆科,菊科,茄科,A\n", "utf-8-sig")
    write(
        folder / "test/agronomy.csv", f"{head}0,大豆属于,禾本科,豆科,菊科,茄科,B\n1,番茄属于,禾本科,豆科,菊科,茄科,D\n"
    )
    return folder


def mmlu(folder: Path) -> Path:
    write(folder / "dev/anatomy_dev.csv", "How many ribs has a human?,12,20,24,30,C\r\n")
    write(
        folder / "val/anatomy_val.csv",
        '"The heart, in man, has",one chamber,two,three,four,D\r\nLongest bone:,"ulna, left",femur,rib,tibia,B\r\n',
    )
    return folder


def gaokao(folder: Path) -> Path:
    single = "1．（ 4分）西周分封，下列省区简称源\n自西周封国的是（ 　　） \n"
    single += "A．河南、河北  B．湖南、湖北  C．山东、山西  D．广东、广\n西\n"
    several = (
        "阅读下面文字，完成1～2题。\n甲地多雨。\n1．甲地的气候是（ ）\nA．热带雨林 B．沙漠\nC．高山 D．苔原\n"
        "2．甲地种植（ ） A．水稻 B．小麦 C．青稞 D．甜菜\n"
    )
    example = {"year": "2010", "category": "（新课标）", "analysis": "略", "score": 4}
    records = [
        {**example, "question": single, "answer": ["C"], "index": 0},
        {**example, "question": several, "answer": ["A", "B"], "index": 1},
    ]
    return write_json(
        folder / "2010-2022_History_MCQs.json", {"keywords": "2010-2022_History_MCQs", "example": records}
    )


def agieval(folder: Path) -> Path:
    plain = {
        "passage": None,
        "question": "细胞膜主要由什么组成？",
        "label": "B",
        "answer": None,
        "other": {"source": "卷"},
    }
    write_lines(folder / "gaokao-biology.jsonl", [{**plain, "options": ["(A)糖", "(B)磷脂", "(C)铁", "(D)水"]}])
    law = {**plain, "question": "下列属于物权的是", "label": ["A", "C"]}
    write_lines(folder / "jec-qa-kd.jsonl", [{**law, "options": ["(A)所有权", "(B)债权", "(C)抵押权", "(D)著作权"]}])
    logic = {"passage": "Six people sit in a row.", "question": "Who sits first?", "label": "E", "other": None}
    write_lines(folder / "lsat-ar.jsonl", [{**logic, "options": [f"({x}){x}nn" for x in "ABCDE"]}])
    sums = {**plain, "question": "若 $a+1=3$, 则 $a=(\\quad)$", "options": None, "label": None, "answer": "2"}
    write_lines(folder / "gaokao-mathcloze.jsonl", [sums])
    return folder


def cpsyexam(folder: Path) -> Path:
    options = {"A": "感觉", "B": "知觉", "C": "记忆", "D": "想象", "E": ""}
    record = {"subject_name": "普通心理学", "question_type": "multi", "kind": "KG", "question": "属于认知过程的是( )",
              "options": options, "answer": "ABCD", "explanation": "", "id": 1}  # fmt: skip
    return write_json(
        folder / "KG-普通心理学.json", [record, {**record, "question_type": "single", "answer": "A", "id": 2}]
    )


def option_text(folder: Path) -> Path:
    record = {
        "instruction": "请直接给出答案文本。",
        "input": "问题：分离沸点不同的物质用\n选项：\n\t膜分离法\n\t分馏法",
        "output": "分馏法",
    }
    english = {
        "instruction": "Answer.",
        "input": "Question: Capital of France?\nOptions:\n\tParis \n\tRome",
        "output": "Paris ",
    }
    return write_json(folder / "exam_option_text.json", [record, english])


def bbh(folder: Path) -> Path:
    examples = [{"input": "not ( True ) is", "target": "False"}, {"input": "True or False is", "target": "True"}]
    write_json(folder / "bbh/boolean_expressions.json", {"canary": "no training", "examples": examples})
    prompt = (
        "BENCHMARK DATA\n-----\nEvaluate the expression.\n\nQ: not True is\nA: Let's think.\nSo the answer is False.\n"
    )
    write(
        folder / "cot-prompts/boolean_expressions.txt", prompt + "\nQ: True is\nA: It is True.\nSo the answer is True."
    )
    return folder / "bbh"


def text(folder: Path) -> Path:
    write_lines(folder / "advert.jsonl", [{"prompt": "类型#裤", "response": "好裤子。"}])
    case = {"id": "0", "title": "腹痛", "description": "病人，男。", "QA_pairs": [
        {"question": "诊断？", "answer": "疝。"}, {"question": "治疗？", "answer": "手术。"}]}  # fmt: skip
    write_json(folder / "clinic.json", [case])
    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"},
             {"role": "user", "content": "再见"}, {"role": "assistant", "content": "再见！"}]  # fmt: skip
    write_lines(folder / "chat.jsonl", [{"messages": turns}, {"question": "1+1?", "answers": ["2", "two"]}])
    write(folder / "clinic_gbk.csv", "department,title,ask,answer\r\n内科,头痛,头痛怎么办,多休息\r\n", "gb18030")
    return folder


def spider(folder: Path) -> Path:
    questions = [
        {"db_id": "pets", "question": "How many pets?", "query": "SELECT count(*) FROM pet", "type": 0},
        {"db_id": "zoo", "question": "All animals?", "query": "SELECT name FROM animal"},
    ]
    database(folder / "database/pets/pets.sqlite")
    write_json(folder / "tables.json", [zoo_tables()])
    return write_json(folder / "dev.json", questions)


def zoo_tables() -> dict[str, Any]:
    """Of Spider's tables.json; a key of two columns and a foreign key."""
    return {
        "db_id": "zoo",
        "table_names_original": ["animal", "sqlite_sequence", "feed plan"],
        "table_names": ["animal", "sqlite sequence", "feed plan"],
        "column_names_original": [[-1, "*"], [0, "id"], [0, "name"], [1, "seq"], [2, "animal_id"], [2, "day"]],
        "column_types": ["text", "number", "text", "text", "number", "text"],
        "primary_keys": [1, [4, 5]],
        "foreign_keys": [[4, 1]],
    }


def database(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as made:
        made.execute("CREATE TABLE pet (id INTEGER PRIMARY KEY, name TEXT)")
        made.execute("INSERT INTO pet (name) VALUES ('Rex')")
        made.commit()
    return path


def defog(folder: Path) -> Path:
    database(folder / "pets/pets.sqlite")
    write_json(folder / "pets.json", {"table_metadata": {"pet": [{"data_type": "text", "column_name": "name"}]}})
    head = "db_name,db_type,query_category,query,question,instructions\n"
    row = (
        "pets,sqlite,group_by,\"SELECT name FROM pet WHERE name <> ';';SELECT id, name FROM pet;\",Which?,Ignore case\n"
    )
    return write(folder / "questions_gen_sqlite.csv", head + row)


def dbgpt(folder: Path) -> Path:
    instruction = (
        "CREATE TABLE city (\ncity_name,\npopulation\n)\n\nCREATE TABLE river (\nname,\nlength NUMERIC(4, 1)\n)\n\n\n"
        "-- Using valid SQLite, answer the following questions for the tables provided above.\n\n"
        "-- which cities are big\nSELECT"
    )
    record = {
        "db_id": "database",
        "instruction": instruction,
        "input": "",
        "output": "SELECT city_name FROM city",
        "history": [],
    }
    return write_json(folder / "example_text2sql.json", [record])


WRITERS = (mmcu, mmcu_json, ceval, cmmlu, mmlu, gaokao, agieval, cpsyexam, option_text, bbh, text, spider, defog, dbgpt)


def write_all(folder: Path) -> list[Path]:
    """Every file of every benchmark, each below a folder of its name."""
    for writer in WRITERS:
        writer(folder / writer.__name__)
    kept = (".csv", ".json", ".jsonl", ".sqlite", ".txt", ".xlsx")
    return sorted(file for file in folder.rglob("*") if file.suffix in kept and file.is_file())
