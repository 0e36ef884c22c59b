"""Answers in many languages, written for these tests; ⟦ and ⟧ stand around what must fork, and in none of the texts."""

LISTS = {
    "English": "Three trees:\n\n1. **Oak**:⟦ It grows slowly and lives for a thousand years.⟧\n2. **Birch**:⟦ It grows fast on poor"
    " and sandy soil.⟧\n3. **Willow**:⟦ It likes to stand beside rivers and ponds.⟧\n\nAll three are common.",
    "German": "Drei Getränke:\n\n- **Kaffee:**⟦ Er macht wach und schmeckt bitter.⟧\n- **Tee:**⟦ Man trinkt ihn z. B. mit Milch und"
    " Zucker.⟧\n- **Saft:**⟦ Er wird aus frischem Obst gepresst.⟧\n\nFazit: Wasser genügt auch.",
    "French": "Voici trois villes :\n\n1. **Paris** :⟦ la capitale attire des millions de visiteurs.⟧\n2. **Lyon** :⟦ on y mange fort"
    " bien toute l'année.⟧\n3. **Brest** :⟦ le port donne sur une grande rade.⟧",
    "Spanish": "Consejos:\n\n* Dormir:⟦ ocho horas cada noche ayudan a la memoria.⟧\n* Caminar:⟦ media hora al día basta para empezar.⟧\n"
    "* Leer:⟦ unas páginas antes de apagar la luz.⟧",
    "Portuguese": "1. **Pão** –⟦ feito de farinha, água e um pouco de sal.⟧\n2. **Queijo** –⟦ feito de leite de vaca ou de cabra.⟧\n"
    "3. **Vinho** –⟦ feito de uvas maduras das encostas do norte.⟧",
    "Italian": "Tre strumenti:\n\n- Violino:⟦ ha quattro corde e si suona con l'arco.⟧\n- Flauto:⟦ si suona soffiando attraverso"
    " un foro.⟧\n- Tamburo:⟦ si batte con le mani o con bacchette.⟧",
    "Russian": "Три реки:\n\n1. **Волга**:⟦ самая длинная река в Европе.⟧\n2. **Лена**:⟦ течёт на север через всю Сибирь.⟧\n"
    "3. **Дон**:⟦ впадает в мелкое Азовское море.⟧",
    "Chinese": "三种茶：\n\n1. **绿茶**：⟦未经发酵，味道清新，含有很多抗氧化物质。⟧\n2. **红茶**：⟦完全发酵，味道浓郁，适合在冬天饮用。⟧\n"
    "3. **乌龙茶**：⟦半发酵，香气独特，介于绿茶和红茶之间。⟧\n\n总之，每种茶都有自己的特点。",
    "Japanese": "三つの季節：\n\n- **春**：⟦桜が咲いて、暖かい日が多くなります。⟧\n- **夏**：⟦とても暑くて、海で泳ぐ人がたくさんいます。⟧\n"
    "- **秋**：⟦木の葉が赤くなり、食べ物がおいしくなります。⟧",
    "Korean": "세 가지 음식:\n\n1. **김치**:⟦ 배추를 소금에 절여 매운 양념으로 버무린다.⟧\n2. **비빔밥**:⟦ 밥 위에 여러 나물을 올려 비벼 먹는다.⟧\n"
    "3. **불고기**:⟦ 얇게 썬 고기를 간장 양념에 재워 굽는다.⟧",
    "Hindi": "तीन मसाले:\n\n1. **हल्दी**:⟦ यह खाने को पीला रंग देती है।⟧\n2. **जीरा**:⟦ यह दाल और सब्ज़ी में डाला जाता है।⟧\n"
    "3. **इलायची**:⟦ यह चाय और मिठाई को सुगंध देती है।⟧",
    "Arabic": "ثلاث فواكه:\n\n1. **التمر**:⟦ ينمو على النخيل في البلاد الحارة.⟧\n2. **التفاح**:⟦ ينمو في المناطق الباردة والمعتدلة.⟧\n"
    "3. **الموز**:⟦ يحتاج إلى حرارة عالية وماء كثير.⟧\n\nفي الختام، كلها مفيدة للصحة.",
    "Hebrew": "שלוש ערים:\n\n- **ירושלים**:⟦ עיר הבירה שוכנת על הרים גבוהים.⟧\n- **חיפה**:⟦ עיר נמל גדולה על הר הכרמל.⟧\n"
    "- **אילת**:⟦ עיר נופש חמה לחוף ים סוף.⟧",
    "Thai": "1. **ชาเขียว**:⟦ ไม่ผ่านการหมัก มีรสสดชื่น⟧\n2. **ชาดำ**:⟦ หมักเต็มที่และมีรสเข้มข้น⟧\n3. **ชาอู่หลง**:⟦ หมักบางส่วน มีกลิ่นหอม⟧",
}  # fmt: skip

PARAGRAPHS = {
    "English": "Cities need trees.\n\nTrees cool the streets.⟦ Their leaves give shade on hot summer days.⟧\n\nParks help people rest."
    "⟦ Many walk there after work with friends.⟧\n\nIn conclusion, plant more trees. Everybody gains from that in the end.",
    "German": "Städte brauchen Bäume.\n\nBäume kühlen die Straßen.⟦ Ihre Blätter spenden an heißen Tagen Schatten.⟧\n\nParks dienen der"
    " Erholung, z. B. am Abend.⟦ Viele gehen dort nach der Arbeit spazieren.⟧",
    "French": "Les villes ont besoin d'arbres.\n\nLes arbres rafraîchissent les rues.⟦ Leurs feuilles donnent de l'ombre en été.⟧\n\n"
    "M. Dupont aime les parcs.⟦ Il y marche chaque soir après le travail.⟧",
    "Spanish": "Las ciudades necesitan árboles.\n\nLos árboles enfrían las calles.⟦ Sus hojas dan sombra en los días de calor.⟧\n\n"
    "¿Sirven los parques?⟦ Muchos pasean allí después del trabajo.⟧",
    "Russian": "Городам нужны деревья.\n\nДеревья охлаждают улицы.⟦ Их листья дают тень в жаркие летние дни.⟧\n\nПарки нужны для отдыха."
    "⟦ Многие гуляют там вечером после долгой работы.⟧",
    "Chinese": "城市需要树木。\n\n树木让街道凉爽。⟦夏天它们的叶子给行人带来阴凉。⟧\n\n公园让人们休息。⟦很多人下班以后和朋友一起去那里散步。⟧",
    "Japanese": "都市には木が必要です。\n\n木は通りを涼しくします。⟦夏の暑い日には葉が日陰を作ってくれます。⟧\n\n"
    "公園は休む場所です。⟦仕事のあとに友達と散歩する人が多いです。⟧",
    "Hindi": "शहरों को पेड़ चाहिए।\n\nपेड़ सड़कों को ठंडा रखते हैं।⟦ गर्मी के दिनों में उनके पत्ते छाया देते हैं।⟧\n\nपार्क आराम के लिए हैं।"
    "⟦ बहुत से लोग काम के बाद वहाँ घूमते हैं।⟧",
    "Arabic": "تحتاج المدن إلى الأشجار.\n\nالأشجار تبرد الشوارع.⟦ أوراقها تعطي ظلا في أيام الصيف الحارة.⟧\n\nهل تفيد الحدائق؟"
    "⟦ كثير من الناس يمشون فيها بعد العمل.⟧",
    "Hebrew": "ערים צריכות עצים.\n\nעצים מקררים את הרחובות.⟦ העלים שלהם נותנים צל בימי הקיץ החמים.⟧\n\nפארקים נועדו למנוחה."
    "⟦ אנשים רבים מטיילים שם אחרי יום העבודה.⟧",
}  # fmt: skip

# the rule that keeps each whole, and the answer
WHOLE = {
    "German: reference": "1. **Teig**: Mehl, Wasser und Salz gut verkneten.\n2. **Ruhe**: Den Teig aus Schritt 1 lange ruhen lassen.\n"
    "3. **Ofen**: Bei starker Hitze eine Stunde backen.",
    "French: sequence": "- Pâte : mélanger la farine avec de l'eau.\n- Repos : ensuite on laisse la pâte dormir.\n- Four : cuire une heure"
    " à feu très vif.",
    "Spanish: reference": "- Masa: mezclar bien la harina y el agua.\n- Reposo: dejar la masa del paso anterior quieta.\n- Horno: cocer una"
    " hora a fuego fuerte.",
    "Russian: reference": "1. **Тесто**: смешать муку, воду и немного соли.\n2. **Отдых**: оставить тесто из пункта 1 надолго.\n"
    "3. **Печь**: выпекать один час в горячей печи.",
    "Chinese: reference": "1. **和面**：把面粉和水放在一起揉成光滑的面团。\n2. **醒发**：把第一步做好的面团放在温暖的地方。\n"
    "3. **烘烤**：在很热的烤箱里烤大约一个小时。",
    "Japanese: sequence": "1. **生地**：小麦粉と水をよく混ぜてこねてください。\n2. **休み**：その後、生地を長い時間休ませておきます。\n"
    "3. **焼き**：とても熱いオーブンで一時間ほど焼きます。",
    "Hindi: sequence": "1. **आटा**: आटे में पानी और नमक मिलाएँ।\n2. **आराम**: फिर आटे को एक घंटा ढक दें।\n3. **तवा**: गरम तवे पर रोटी"
    " अच्छी तरह सेंकें।",
    "Arabic: reference": "1. **العجين**: اخلط الدقيق والماء والملح جيدا.\n2. **الراحة**: اترك عجين الخطوة السابقة مدة طويلة.\n"
    "3. **الفرن**: اخبز ساعة كاملة في فرن حار.",
    "Hebrew: sequence": "1. **בצק**: לערבב קמח ומים עם מעט מלח.\n2. **מנוחה**: לאחר מכן להניח לבצק זמן רב.\n3. **תנור**: לאפות שעה"
    " אחת בתנור חם מאוד.",
    "Chinese: leaning": "城市需要树木。\n\n树木让街道凉爽。夏天它们的叶子给行人带来阴凉。\n\n但是树木需要水。很多人下班以后和朋友一起去浇水。",
}  # fmt: skip
