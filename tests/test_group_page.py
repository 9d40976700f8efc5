"""docs/group.html in a real browser: what it shows is what drgrpo.py computes.

Chromium is moved with a mouse, a finger and the keyboard. The page's numbers are compared with
`group_advantages` and the gradient of `drgrpo_loss`, and those of the two other methods with their
formulas.
"""

import math
import os
import random
import shutil

import pytest
import torch
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By

from drgrpo import drgrpo_loss, group_advantages
from findings.common import METHODS
from tests.helpers import ROOT, TOY

pytestmark = pytest.mark.slow
L_MAX = TOY.max_response_tokens
MINUS = "\u2212"  # the sign, which is longer than a hyphen
THUMB = 16  # pixels: Chromium's slider ends half a thumb before its box
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}


@pytest.fixture(scope="module")
def browser():
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        absent = pytest.fail if os.environ.get("CI") else pytest.skip
        absent("needs a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1280,1000"):
        options.add_argument(argument)  # root, as in CI, has no sandbox
    browser = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser):
    browser.get((ROOT / "docs/group.html").as_uri())
    yield browser
    assert browser.get_log("browser") == []  # no error, and nothing that could not be loaded


def expected(rewards, lengths):
    """The push on each token of each response, by method, in float64."""
    group, tokens = torch.tensor([rewards]).double(), torch.tensor(lengths)
    mask = torch.arange(L_MAX) < tokens[:, None]  # (G, L_max)
    pushes = {}
    for name, method in METHODS.items():
        logprobs = torch.zeros(mask.shape, dtype=torch.float64, requires_grad=True)
        loss, _ = drgrpo_loss(
            logprobs,
            logprobs.detach(),
            group_advantages(group, method.divide_by_std)[0],
            mask,
            len(lengths) * (1 if method.divide_by_length else L_MAX),
            divide_by_length=method.divide_by_length,
        )
        (gradient,) = torch.autograd.grad(-loss, logprobs)
        pushes[name] = gradient[:, 0].tolist()
    pushes["dapo"] = (group_advantages(group, True)[0] / tokens.sum()).tolist()
    others = [(sum(rewards) - reward) / (len(rewards) - 1) for reward in rewards]
    pushes["loo"] = [(r - o) / (len(rewards) * L_MAX) for r, o in zip(rewards, others)]
    return pushes


def same(numbers):
    return pytest.approx(numbers, rel=1e-6, abs=1e-12)


def slider(page, kind, response):
    return page.find_elements(By.CSS_SELECTOR, f"input.{kind}")[response - 1]


def values(page, kind):
    return [float(box.get_attribute("value")) for box in page.find_elements(By.CLASS_NAME, kind)]


def place(box, value):
    """Pixels from the middle of a slider to its thumb, when it stands at `value`."""
    least, most = (float(box.get_attribute(end)) for end in ("min", "max"))
    return round((box.size["width"] - THUMB) * ((value - least) / (most - least) - 0.5))


# For each method the cells of its column: [number, what one reads, bar's side, or 0 without a bar]
SHOWN = """
const columns = {};
for (const cell of document.querySelectorAll("#group [data-value]")) {
    const edges = (part) => cell.querySelector(part)?.getBoundingClientRect();
    const bar = edges("i"), box = edges(".bar");
    const side = bar?.width ? Math.sign(bar.left + bar.right - box.left - box.right) : 0;
    const column = columns[cell.dataset.method] ??= [];
    column.push([Number(cell.dataset.value), cell.lastChild.innerText, side]);
}
return columns;
"""


def check(page):
    """Everything that the page shows belongs to where its sliders stand now."""
    rewards, lengths = values(page, "reward"), [int(length) for length in values(page, "length")]
    pushes, shown = expected(rewards, lengths), page.execute_script(SHOWN)
    assert shown.keys() == pushes.keys()
    for name, column in pushes.items():
        numbers, texts, sides = zip(*shown[name])
        sums = [0.0, 0.0]  # over the right responses, and over the wrong ones
        for reward, length, push in zip(rewards, lengths, column):
            sums[0 if reward >= 0.5 else 1] += length * push
        assert list(numbers) == same(column + sums), name
        read = [float(text.replace(MINUS, "-")) / 1000 for text in texts]
        assert read == pytest.approx(column + sums, abs=0.0000051), name
        signs = [math.copysign(1, push) if push else 0 for push in column]
        assert list(sides) == signs + [0, 0], name
    return pushes


def test_the_group_at_the_start_has_the_numbers_of_drgrpo(page):
    check(page)
    assert values(page, "length")[0] == L_MAX


def test_a_mouse_drags_and_the_keyboard_moves_on(page):
    before = check(page)
    box = slider(page, "length", 1)
    start, end = place(box, L_MAX), place(box, 24)
    mouse = ActionChains(page).move_to_element_with_offset(box, start, 0).click_and_hold()
    mouse.move_by_offset(end - start, 0).release().perform()
    assert values(page, "length")[0] == pytest.approx(24, abs=1)  # a pixel is most of a token
    after = check(page)
    assert abs(after["grpo"][0]) > 2.5 * abs(before["grpo"][0])
    assert after["drgrpo"][0] == before["drgrpo"][0]
    assert page.find_element(By.ID, "chosen").text == "1"  # whose numbers the formulas have
    ActionChains(page).send_keys(Keys.TAB).perform()
    assert page.find_element(By.ID, "chosen").text == "2"
    ActionChains(page).send_keys(*[Keys.ARROW_RIGHT] * 6).perform()
    assert values(page, "reward") == [0, 0.6, 0, 0, 0, 1, 1, 1]
    check(page)
    formulas = page.find_element(By.ID, "formulas").text
    assert f"(0.6 {MINUS} 0.450) / 0.499 / (8 · 19) = +1.98/1000" in formulas


def test_a_finger_drags_on_a_phone(page):
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    box = slider(page, "length", 1)
    at = page.execute_script(
        "arguments[0].scrollIntoView({block: 'center'});"
        "const box = arguments[0].getBoundingClientRect();"
        "return [(box.left + box.right) / 2, (box.top + box.bottom) / 2, scrollY];",
        box,
    )
    for kind, value in (("Start", 72), ("Move", 60), ("Move", 30), ("Move", 10), ("End", None)):
        points = [] if value is None else [{"x": at[0] + place(box, value), "y": at[1]}]
        touch = {"type": f"touch{kind}", "touchPoints": points}
        page.execute_cdp_cmd("Input.dispatchTouchEvent", touch)
    assert values(page, "length")[0] == pytest.approx(10, abs=1)
    check(page)
    wide = page.execute_script("return [document.documentElement.scrollWidth, scrollY]")
    page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide == [PHONE["width"], at[2]]  # nothing sticks out, and the page did not scroll


def test_the_buttons_show_how_the_std_weighs_a_group(page):
    weights = {"Reset": "1.93", "4 right": "1.87", "1 right": "2.83", "8 right": "none"}
    for name, weight in weights.items():
        page.find_element(By.XPATH, f"//button[text()='{name}']").click()
        check(page)
        (cell,) = page.find_elements(By.CSS_SELECTOR, "tfoot tr:last-child [data-method=grpo]")
        assert cell.text == weight


def test_any_group_has_the_numbers_of_drgrpo(page):
    draw = random.Random(0)
    for kinds in [(0, 1), (0, 0.1, 1), (0.1,), (0.3, 0.7), (-1, 0.5, 2)] * 10:
        rewards = [float(draw.choice(kinds)) for _ in range(8)]
        lengths = [draw.randint(1, L_MAX) for _ in range(8)]
        shown = page.execute_script("return pushes(arguments[0], arguments[1])", rewards, lengths)
        pushes = expected(rewards, lengths)
        assert shown.keys() == pushes.keys()
        for name, column in pushes.items():
            assert shown[name] == same(column), (name, rewards, lengths)
