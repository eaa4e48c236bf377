"""The paper's request for an instruction (Figure 13), character by character as published.

Source: src/prompt.py of https://github.com/cxcscmu/Montessori-Instruct, under the MIT License:

Copyright (c) 2024 Xiaochuan Li

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

PAPER_REQUEST = """
Generate an instruction. This instruction should be a question that humans would be ask. It can be in imperative or \
interrogative form. We will use the instructions you generate to train models, so you must ensure that the instructions \
generated are of high quality and correct and also keep the instruction clear and concise.
You should:
1. Briefly explain why you generate this instruction.
2. Think about whether you need to add some input to this instruction so that it can be answered directly. (For example, for \
tasks that involve summarizing, you need to provide the paragraph to be summarized).
3. Return you output strictly following the format:\x20

Your generated instruction should strictly follow the following format:
<instruction><YOUR INSTRUCTION HERE> <YOUR_INPUT_HERE></instruction>

If there is no need to add inputs to answer the instruction, you can skip the <YOUR_INPUT_HERE> part. If you need to add \
inputs, just replace the <YOUR_INPUT_HERE> with the input. Now here are some examples of reference instructions, and please \
generate only one instruction.
"""
