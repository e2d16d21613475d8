//! Contenders measured in turn, round after round, so that a machine that changes its speed changes it for all of them.

use std::time::{Duration, Instant};

/// About how long a contender runs in a round.
const TURN: Duration = Duration::from_millis(20);

pub struct Contest<'c> {
    title: String,
    contenders: Vec<Contender<'c>>,
}

/// Which contender another is compared with.
#[derive(Clone, Copy)]
pub struct Baseline(usize);

struct Contender<'c> {
    name: String,
    baseline: Option<Baseline>,
    /// Does it so many times and says how long that took.
    run: Box<dyn FnMut(u64) -> Duration + 'c>,
    times: u64,
    /// Nanoseconds each, by round.
    results: Vec<f64>,
}

/// Does `once` so many times.
pub fn timed(times: u64, mut once: impl FnMut()) -> Duration {
    let started = Instant::now();
    for _ in 0..times {
        once();
    }
    started.elapsed()
}

impl<'c> Contest<'c> {
    pub fn new(title: impl Into<String>) -> Self {
        Self { title: title.into(), contenders: Vec::new() }
    }

    /// Enters one that the following are compared with.
    pub fn baseline(&mut self, name: impl Into<String>, run: impl FnMut(u64) -> Duration + 'c) -> Baseline {
        self.enter(name.into(), None, Box::new(run));
        Baseline(self.contenders.len() - 1)
    }

    pub fn against(&mut self, baseline: Baseline, name: impl Into<String>, run: impl FnMut(u64) -> Duration + 'c) {
        self.enter(name.into(), Some(baseline), Box::new(run));
    }

    fn enter(&mut self, name: String, baseline: Option<Baseline>, run: Box<dyn FnMut(u64) -> Duration + 'c>) {
        self.contenders.push(Contender { name, baseline, run, times: 1, results: Vec::new() });
    }

    /// Runs the rounds and prints the results.
    pub fn hold(mut self, rounds: usize) {
        for contender in &mut self.contenders {
            contender.calibrate();
        }
        for round in 0..rounds {
            // Nobody always comes after the same neighbour.
            let count = self.contenders.len();
            for turn in 0..count {
                let contender = &mut self.contenders[(turn + round) % count];
                let took = (contender.run)(contender.times);
                contender.results.push(took.as_nanos() as f64 / contender.times as f64);
            }
        }
        println!("\n{}", self.title);
        for contender in &self.contenders {
            let ratio = contender.baseline.map(|Baseline(index)| contender.compared(&self.contenders[index]));
            println!("  {:<46} {:>9}{}", contender.name, shown(median(&contender.results)), ratio.unwrap_or_default());
        }
    }
}

impl Contender<'_> {
    /// Finds how many times fill a turn; that warms it up too. The fastest try tells: a slow one was disturbed.
    fn calibrate(&mut self) {
        let (mut fastest, mut full) = (f64::INFINITY, 0);
        while full < 3 {
            let took = (self.run)(self.times);
            fastest = fastest.min(took.as_secs_f64().max(1e-9) / self.times as f64);
            full += u32::from(took >= TURN / 2);
            let wanted = TURN.as_secs_f64() / fastest;
            self.times = wanted.min(self.times as f64 * 100.0).ceil() as u64;
        }
    }

    /// Round by round: the ratio to `other`, its extremes, and the difference.
    fn compared(&self, other: &Self) -> String {
        let pairs = || self.results.iter().zip(&other.results);
        let ratios: Vec<f64> = pairs().map(|(own, base)| own / base).collect();
        let added = median(&pairs().map(|(own, base)| own - base).collect::<Vec<_>>());
        let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
        let most = ratios.iter().copied().fold(0.0, f64::max);
        let sign = if added < 0.0 { '-' } else { '+' };
        format!("  {:>5.2} [{least:.2} .. {most:.2}]  {sign}{}", median(&ratios), shown(added.abs()))
    }
}

pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

/// Nanoseconds for people.
pub fn shown(nanoseconds: f64) -> String {
    match nanoseconds {
        few if few < 1e3 => format!("{few:.0} ns"),
        more if more < 1e6 => format!("{:.2} µs", more / 1e3),
        many => format!("{:.2} ms", many / 1e6),
    }
}
