exec(open('/tmp/mse/x.py').read().split("go('rtn'")[0])
def go(name,src,group,ratios,method='mse'):
    I._RATIOS=ratios
    out=Path('/tmp/mse/out2')
    import contextlib,io
    b=io.StringIO()
    with contextlib.redirect_stdout(b): run(['quantize',str(src),str(out),'--group-size',group,'--method',method,'--overwrite','--json','--jobs','1'])
    e=json.loads(b.getvalue().strip().splitlines()[-1])['quantize']['error']['relative_rms']['mean']
    print(name,group,f"weights {e:.4f}",[round(e,4) for e in Q.output_errors(Path(src),out,C)],flush=True)
q='/work/shared/checkpoints/qwen3moe-12m'; l='/tmp/lead-bench/q/tuned'
for src,g in ((q,'64'),(q,'32'),(l,'32'),(l,'128')):
    go('rtn',src,g,(1.0,),'rtn'); go('1.0',src,g,(1.0,)); go('1,.96',src,g,(1.0,.96)); go('5',src,g,(1.0,0.92,0.84,0.76,0.68))
