//! Contenders that serve requests on several threads: how many requests each of them serves, how alike it treats the
//! threads, and how long its slowest requests take. The contenders take turns, in another order each round.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::contest::{median, shown};
use crate::table::ROWS;

/// How long one contender is measured in a round.
const TURN: Duration = Duration::from_millis(200);

pub struct Throughput<'c> {
    title: String,
    threads: usize,
    /// The others are compared with the first.
    contenders: Vec<Contender<'c>>,
}

struct Contender<'c> {
    name: String,
    run: Box<dyn Fn(usize) -> Turn + 'c>,
    turns: Vec<Turn>,
}

/// The figures of one turn.
struct Turn {
    /// Per second.
    requests: f64,
    /// The requests of the slowest thread, divided by those of the fastest thread.
    share: f64,
    /// Nanoseconds that 99 of 100 requests did not exceed, and the longest.
    p99: f64,
    longest: f64,
}

impl<'c> Throughput<'c> {
    pub fn new(title: impl Into<String>, threads: usize) -> Self {
        Self { title: title.into(), threads, contenders: Vec::new() }
    }

    /// Enters a contender. In a turn each thread makes a `client`, which sends one request after another.
    pub fn enter<R: FnMut(i32)>(&mut self, name: impl Into<String>, client: impl Fn() -> R + Sync + 'c) {
        let run = Box::new(move |threads| Turn::take(threads, &client));
        self.contenders.push(Contender { name: name.into(), run, turns: Vec::new() });
    }

    /// Runs the rounds, after one that warms up and does not count, and prints the results.
    pub fn hold(mut self, rounds: usize) {
        let count = self.contenders.len();
        for round in 0..=rounds {
            for turn in 0..count {
                let contender = &mut self.contenders[(turn + round) % count];
                let figures = (contender.run)(self.threads);
                if round > 0 {
                    contender.turns.push(figures);
                }
            }
        }
        println!("\n{}", self.title);
        for (index, contender) in self.contenders.iter().enumerate() {
            contender.print((index > 0).then(|| &self.contenders[0]));
        }
    }
}

impl Contender<'_> {
    fn print(&self, baseline: Option<&Self>) {
        let of = |figure: fn(&Turn) -> f64| median(&self.turns.iter().map(figure).collect::<Vec<_>>());
        let ratio = baseline.map(|baseline| {
            let pairs = self.turns.iter().zip(&baseline.turns);
            let ratios: Vec<f64> = pairs.map(|(own, base)| own.requests / base.requests).collect();
            let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
            let most = ratios.iter().copied().fold(0.0, f64::max);
            format!("{:>5.2} times [{least:.2} .. {most:.2}]", median(&ratios))
        });
        println!(
            "  {:<34} {:>8.0} a second  slowest thread {:>4.2} of the fastest  p99 {:>9}  longest {:>9}  {}",
            self.name,
            of(|turn| turn.requests),
            of(|turn| turn.share),
            shown(of(|turn| turn.p99)),
            shown(of(|turn| turn.longest)),
            ratio.unwrap_or_default(),
        );
    }
}

impl Turn {
    fn take<R: FnMut(i32)>(threads: usize, client: &(impl Fn() -> R + Sync)) -> Self {
        let (start, over) = (Barrier::new(threads + 1), AtomicBool::new(false));
        let each = |thread: usize| {
            let mut took = Vec::with_capacity(1 << 14);
            let mut id = thread as i32;
            let mut request = client();
            start.wait();
            while !over.load(Ordering::Relaxed) {
                let began = Instant::now();
                request(id);
                took.push(began.elapsed().as_nanos() as f64);
                id = (id + 7) % ROWS;
            }
            took
        };
        let each = &each;
        let (took, time) = thread::scope(|scope| {
            let all: Vec<thread::ScopedJoinHandle<'_, Vec<f64>>> =
                (0..threads).map(|thread| scope.spawn(move || each(thread))).collect();
            start.wait();
            let began = Instant::now();
            thread::sleep(TURN);
            over.store(true, Ordering::Relaxed);
            let took: Vec<Vec<f64>> = all.into_iter().map(|thread| thread.join().unwrap()).collect();
            (took, began.elapsed())
        });
        let counts = || took.iter().map(Vec::len);
        let mut all: Vec<f64> = took.iter().flatten().copied().collect();
        all.sort_by(f64::total_cmp);
        Self {
            requests: all.len() as f64 / time.as_secs_f64(),
            share: counts().min().unwrap_or_default() as f64 / counts().max().unwrap_or(1).max(1) as f64,
            p99: all[all.len() * 99 / 100],
            longest: all[all.len() - 1],
        }
    }
}
