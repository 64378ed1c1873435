import json
from openai import OpenAI
client = OpenAI(base_url="http://127.0.0.1:8091/v1", api_key="none")
model = client.models.list().data[0].id
Q = ["I want to find a restaurant in San Jose.", "Can you book a table for two people at 7 pm?", "What is the weather like in London tomorrow?",
 "Tom has 3 apples and buys 4 more. How many apples does he have?", "A book costs 12 dollars. How much do 5 books cost?",
 "What is the capital of France?", "Write a short poem about the sea.", "Explain what a compiler does.", "How do I list the files in a directory?", "Thank you, that is all. Goodbye."]
out=[]
for q in Q:
    r = client.chat.completions.create(model=model, messages=[{"role":"user","content":q}], max_tokens=60, temperature=0.3, seed=0)
    out.append((q, r.choices[0].message.content.strip(), r.choices[0].finish_reason, r.usage.completion_tokens))
    print("Q:",q,"\nA:",out[-1][1],out[-1][2],out[-1][3])
json.dump(out, open("answers.json","w"), ensure_ascii=False, indent=1)
