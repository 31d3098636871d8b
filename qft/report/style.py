"""How the page looks: light and dark, wide and narrow, on a screen and on paper."""

PAGE = """
:root{--ink:#1d2430;--soft:#667085;--line:#e4e7ec;--back:#f6f7f9;--card:#ffffff;--mark:#ffe9a8;
--mark-ink:#3d2e00;--good:#1f7a4d;--good-back:#e3f5ec;--open:#8a5a00;--open-back:#fdf1d6;
--code:#f2f4f7}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#98a2b3;--line:#2c3440;
--back:#0f1319;--card:#151a21;--mark:#5a4a12;--mark-ink:#ffefc2;--good:#6fd6a2;
--good-back:#12301f;--open:#f0c469;--open-back:#33270d;--code:#1c232d}}
@media print{:root{--ink:#1d2430;--soft:#667085;--line:#e4e7ec;--back:#ffffff;--card:#ffffff;
--mark:#ffe9a8;--mark-ink:#3d2e00;--good:#1f7a4d;--good-back:#e3f5ec;--open:#8a5a00;
--open-back:#fdf1d6;--code:#f2f4f7}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);line-height:1.5;font-size:15px;
font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Noto Sans',sans-serif}
main{max-width:1180px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:27px;line-height:1.25;margin:4px 0 10px;overflow-wrap:anywhere}
h2{font-size:18px;margin:0 0 14px}
p{margin:0 0 10px}
.over{color:var(--soft);font-size:13px;overflow-wrap:anywhere}
.soft{color:var(--soft);font-size:13px}
.result{font-size:17px}
.pill{display:inline-block;border-radius:99px;padding:1px 10px;margin-left:8px;font-weight:600;
font-size:12px}
.pill.good{color:var(--good);background:var(--good-back)}
.pill.open{color:var(--open);background:var(--open-back)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;
margin:20px 0 0}
.cards div{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:12px 16px}
.cards dt{color:var(--soft);font-size:13px}
.cards dd{margin:2px 0 0;font-size:20px;font-weight:650;font-variant-numeric:tabular-nums}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;margin-top:20px;
padding:22px 24px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));
gap:26px 34px;margin-bottom:14px}
figure{margin:0;min-width:0}
svg.q-chart{display:block;width:100%;max-width:600px;height:auto}
.wide{overflow-x:auto;margin-bottom:8px}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:6px 18px 6px 0;text-align:left;border-bottom:1px solid var(--line);
vertical-align:top}
tbody th{font-weight:500}
thead th{color:var(--soft);font-weight:500;font-size:13px}
table.numbers td,table.numbers th{white-space:nowrap}
table.plan td:last-child{white-space:normal;min-width:15em}
details{margin-top:10px}
summary{cursor:pointer;color:var(--soft);font-size:14px;margin-bottom:8px}
pre,code{font-family:ui-monospace,'Cascadia Code',Menlo,Consolas,'DejaVu Sans Mono',monospace;
font-size:13px;background:var(--code);border-radius:6px}
pre{padding:14px 16px;overflow-x:auto;margin:0}
code{padding:2px 6px;overflow-wrap:anywhere}
article{border-top:1px solid var(--line);padding:12px 0 4px}
article .top{margin:0 0 6px;font-size:14px}
.row{white-space:pre-wrap;overflow-wrap:anywhere;font-size:14px;max-height:340px;overflow:auto;
background:var(--code);border-radius:8px;padding:12px 14px;margin-bottom:8px;
unicode-bidi:isolate}
.row span,.row mark{unicode-bidi:isolate}
mark{background:var(--mark);color:var(--mark-ink);border-radius:3px;padding:1px 2px;
box-decoration-break:clone;-webkit-box-decoration-break:clone}
ul{margin:0;padding-left:20px}
.steps{display:grid;grid-template-columns:max-content 1fr;gap:8px 20px;margin:0}
.steps dd{margin:0;min-width:0}
@media (max-width:620px){main{padding:18px 12px 40px}section{padding:16px 13px}h1{font-size:22px}
.steps{grid-template-columns:1fr;gap:2px}.steps dd{margin-bottom:10px}
.cards{grid-template-columns:1fr 1fr;gap:8px}.cards div{padding:9px 12px}.cards dd{font-size:17px}}
@media print{main{max-width:none;padding:0}.charts{grid-template-columns:1fr 1fr;gap:16px 22px}
section{padding:14px 16px}table{font-size:11px}th,td{padding:3px 10px 3px 0}
section,.cards div{border-color:#cccccc}
figure,article,tr,.cards div{break-inside:avoid}.row{max-height:none}h2{break-after:avoid}
details::details-content{content-visibility:visible;height:auto}}
"""
