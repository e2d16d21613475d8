use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::program;

/// A TCP proxy on a loopback port that can be told to misbehave. All its threads end when it is dropped.
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Forwards everything.
    Pass,
    /// The port is closed: connection refused. Connections that exist go on.
    Refuse,
    /// Accepts and closes at once. Connections that exist go on.
    HangUp,
    /// Accepts, and keeps to itself whatever either side sends, until another mode lets it go.
    Silent,
    /// Cuts a connection once it has carried so many bytes, in both directions together, since this mode was set.
    CutAfter(usize),
    /// Cuts a connection on which the client sends these bytes.
    CutOn(Vec<u8>, Moment),
    /// Lets a new connection wait before it reaches the server.
    Delay(Duration),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The server never sees the bytes.
    BeforeForwarding,
    /// The server has seen and answered them; the client never gets the answer.
    BeforeAnswer,
}

impl Proxy {
    pub fn to(server: impl ToSocketAddrs) -> Proxy {
        let server = server.to_socket_addrs().expect("an address").next().expect("an address");
        let listener = program::free_listener();
        let port = listener.local_addr().expect("a bound listener has an address").port();
        let shared = Arc::new(Shared::new(server));
        let acceptor = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.accept_all(listener, port)
        });
        let proxy = Proxy { port, shared, acceptor: Some(acceptor) };
        proxy.settle();
        proxy
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn address(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.port).into()
    }

    /// In force when it returns, for existing connections too.
    pub fn set(&self, mode: Mode) {
        assert!(!matches!(&mode, Mode::CutOn(pattern, _) if pattern.is_empty()), "nothing to look for");
        {
            let mut state = self.shared.lock();
            state.mode = mode;
            state.epoch += 1;
        }
        self.settle();
    }

    /// New connections reach the server at this port of the same host.
    pub fn lead_to(&self, port: u16) {
        self.shared.server.lock().expect("no panic holds it").set_port(port);
    }

    /// Cuts every connection there is; new ones follow the mode.
    pub fn cut_all(&self) {
        for link in &self.shared.lock().links {
            link.cut();
        }
    }

    /// Connections accepted so far.
    pub fn accepted(&self) -> usize {
        self.shared.accepted.load(SeqCst)
    }

    /// Connections open now.
    pub fn open(&self) -> usize {
        self.shared.lock().links.len()
    }

    /// How often a client began to send, at the start or after the server had sent something: its round trips.
    pub fn round_trips(&self) -> usize {
        self.shared.round_trips.load(SeqCst)
    }

    /// Bytes that clients have sent so far, also those that the proxy has not read yet.
    pub fn sent(&self) -> usize {
        let links = self.shared.lock().links.clone();
        let _reading: Vec<_> = links.iter().map(|link| link.reading.lock().expect("no panic holds it")).collect();
        let unread = links.iter().map(|link| link.client.peek(&mut [0; 16 * 1024]).unwrap_or(0)).sum::<usize>();
        unread + self.shared.sent.load(SeqCst)
    }

    /// Waits until the acceptor has opened or closed the port as the mode says.
    fn settle(&self) {
        self.shared.changed.notify_all();
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut state = self.shared.lock();
        while state.listening != state.wants_port() {
            assert!(Instant::now() < deadline, "the proxy's acceptor is gone");
            if state.listening {
                // An acceptor that sits in `accept` needs a visitor to look up.
                drop(state);
                let _ = TcpStream::connect(self.address());
                state = self.shared.lock();
            }
            if state.listening != state.wants_port() {
                state = self.shared.wait(state, TICK);
            }
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.lock().stopping = true;
        self.settle();
        let acceptor = self.acceptor.take().expect("joined once");
        if acceptor.join().is_err() && !thread::panicking() {
            panic!("the proxy panicked");
        }
    }
}

const TICK: Duration = Duration::from_millis(10);

struct Shared {
    server: Mutex<SocketAddr>,
    accepted: AtomicUsize,
    round_trips: AtomicUsize,
    sent: AtomicUsize,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    mode: Mode,
    /// Counts the modes that were set.
    epoch: usize,
    listening: bool,
    stopping: bool,
    links: Vec<Arc<Link>>,
}

impl State {
    fn wants_port(&self) -> bool {
        !self.stopping && self.mode != Mode::Refuse
    }
}

impl Shared {
    fn new(server: SocketAddr) -> Shared {
        let state = State { mode: Mode::Pass, epoch: 0, listening: false, stopping: false, links: Vec::new() };
        let (accepted, round_trips, sent) = Default::default();
        Shared {
            server: Mutex::new(server),
            accepted,
            round_trips,
            sent,
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    fn accept_all(&self, listener: TcpListener, port: u16) {
        let mut first = Some(listener);
        thread::scope(|scope| {
            while self.wait_until_wanted() {
                let listener = first.take().map_or_else(|| TcpListener::bind(("127.0.0.1", port)), Ok);
                let listener = listener.expect("the proxy's port is still free");
                self.set_listening(true);
                while let Some((client, mode)) = self.accept(&listener) {
                    if mode != Mode::HangUp {
                        scope.spawn(|| self.serve(client));
                    }
                }
                drop(listener);
                self.set_listening(false);
            }
            for link in &self.lock().links {
                link.cut();
            }
        });
    }

    /// False when the proxy ends.
    fn wait_until_wanted(&self) -> bool {
        let mut state = self.lock();
        while !state.wants_port() && !state.stopping {
            state = self.wait(state, TICK);
        }
        !state.stopping
    }

    /// The next client, or nothing when the port is to be closed.
    fn accept(&self, listener: &TcpListener) -> Option<(TcpStream, Mode)> {
        let client = loop {
            match listener.accept() {
                Ok((client, _)) => break client,
                Err(_) => thread::park_timeout(TICK),
            }
        };
        let state = self.lock();
        if !state.wants_port() {
            return None;
        }
        self.accepted.fetch_add(1, SeqCst);
        Some((client, state.mode.clone()))
    }

    fn set_listening(&self, listening: bool) {
        self.lock().listening = listening;
        self.changed.notify_all();
    }

    /// One connection from its first byte to its last.
    fn serve(&self, client: TcpStream) {
        let link = Arc::new(Link::new(client));
        self.lock().links.push(Arc::clone(&link));
        if let Some(server) = self.admit(&link) {
            *link.server.lock().expect("no panic holds it") = Some(server.try_clone().expect("a second handle"));
            thread::scope(|scope| {
                scope.spawn(|| self.pump(&link, Direction::ToServer, &link.client, &server));
                self.pump(&link, Direction::ToClient, &server, &link.client);
            });
        }
        link.cut();
        self.lock().links.retain(|other| !Arc::ptr_eq(other, &link));
    }

    /// Holds a new connection back as long as the mode wants, then connects it; nothing when either side is gone.
    fn admit(&self, link: &Link) -> Option<TcpStream> {
        let arrival = Instant::now();
        let mut state = self.lock();
        while !state.stopping {
            state = match state.mode {
                Mode::Silent => {
                    drop(state);
                    if link.client_left() {
                        return None;
                    }
                    self.wait(self.lock(), TICK)
                }
                Mode::Delay(delay) if arrival.elapsed() < delay => {
                    self.wait(state, delay.saturating_sub(arrival.elapsed()))
                }
                _ => {
                    drop(state);
                    let server = *self.server.lock().expect("no panic holds it");
                    return TcpStream::connect(server).ok().map(prepared);
                }
            };
        }
        None
    }

    fn pump(&self, link: &Link, direction: Direction, mut from: &TcpStream, mut to: &TcpStream) {
        let mut held = Vec::new();
        let mut tail = Vec::new();
        let mut ended = false;
        let mut buffer = [0; 16 * 1024];
        loop {
            let read = match direction {
                Direction::ToServer => self.read_from_client(link, &mut buffer),
                Direction::ToClient => from.read(&mut buffer),
            };
            match read {
                Ok(0) => ended = true,
                Ok(count) => held.extend_from_slice(&buffer[..count]),
                Err(error) if is_tick(&error) => {}
                Err(_) => break,
            }
            let (mode, epoch) = {
                let state = self.lock();
                (state.mode.clone(), state.epoch)
            };
            if mode == Mode::Silent {
                // A client that leaves is gone; a server that leaves a silent network goes unnoticed.
                if ended && (direction == Direction::ToServer || link.is_cut.load(SeqCst)) {
                    break;
                }
                if ended {
                    thread::park_timeout(TICK);
                }
                continue;
            }
            let mut cut = false;
            if !held.is_empty() {
                match &mode {
                    Mode::CutAfter(limit) => {
                        let allowed = link.allow(epoch, held.len(), *limit);
                        cut = allowed < held.len() || link.carried(epoch) >= *limit;
                        held.truncate(allowed);
                    }
                    Mode::CutOn(pattern, moment)
                        if direction == Direction::ToServer && contains(&mut tail, &held, pattern) =>
                    {
                        match moment {
                            Moment::BeforeForwarding => break,
                            Moment::BeforeAnswer => link.swallow.store(true, SeqCst),
                        }
                    }
                    _ => {}
                }
                match direction {
                    Direction::ToServer if !link.asking.swap(true, SeqCst) => {
                        self.round_trips.fetch_add(1, SeqCst);
                    }
                    Direction::ToClient if link.swallow.load(SeqCst) => break,
                    Direction::ToClient => link.asking.store(false, SeqCst),
                    Direction::ToServer => {}
                }
                if to.write_all(&held).is_err() {
                    break;
                }
                held.clear();
            }
            if ended || cut {
                break;
            }
        }
        link.cut();
    }

    /// Reads and counts under one lock: the bytes of a client are either unread or counted.
    fn read_from_client(&self, link: &Link, buffer: &mut [u8]) -> std::io::Result<usize> {
        let mut client = &link.client;
        client.peek(&mut [0])?;
        let _reading = link.reading.lock().expect("no panic holds it");
        let count = client.read(buffer)?;
        self.sent.fetch_add(count, SeqCst);
        Ok(count)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic holds it")
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, limit: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, limit).expect("no panic holds it").0
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToServer,
    ToClient,
}

/// One client and, as soon as it is admitted, its server.
struct Link {
    client: TcpStream,
    /// Held while the client's bytes are read and counted.
    reading: Mutex<()>,
    server: Mutex<Option<TcpStream>>,
    /// Whether the client was the last to send.
    asking: AtomicBool,
    /// Whether the server's next bytes are the ones to lose.
    swallow: AtomicBool,
    is_cut: AtomicBool,
    /// The epoch that is being counted, and its bytes.
    carried: Mutex<(usize, usize)>,
}

impl Link {
    fn new(client: TcpStream) -> Link {
        Link {
            client: prepared(client),
            reading: Mutex::new(()),
            server: Mutex::new(None),
            asking: AtomicBool::new(false),
            swallow: AtomicBool::new(false),
            is_cut: AtomicBool::new(false),
            carried: Mutex::new((0, 0)),
        }
    }

    fn cut(&self) {
        self.is_cut.store(true, SeqCst);
        let _ = self.client.shutdown(Shutdown::Both);
        if let Some(server) = &*self.server.lock().expect("no panic holds it") {
            let _ = server.shutdown(Shutdown::Both);
        }
    }

    fn client_left(&self) -> bool {
        match self.client.peek(&mut [0]) {
            Ok(count) => count == 0,
            Err(error) => !is_tick(&error),
        }
    }

    /// How many of `wanted` more bytes the limit lets through; they count as carried.
    fn allow(&self, epoch: usize, wanted: usize, limit: usize) -> usize {
        let mut carried = self.carried.lock().expect("no panic holds it");
        if carried.0 != epoch {
            *carried = (epoch, 0);
        }
        let allowed = wanted.min(limit.saturating_sub(carried.1));
        carried.1 += allowed;
        allowed
    }

    fn carried(&self, epoch: usize) -> usize {
        let carried = self.carried.lock().expect("no panic holds it");
        if carried.0 == epoch { carried.1 } else { 0 }
    }
}

/// Reads return after a tick at the latest, so that a change of mode is seen.
fn prepared(stream: TcpStream) -> TcpStream {
    stream.set_nodelay(true).expect("an option of TCP");
    stream.set_read_timeout(Some(TICK)).expect("an option of TCP");
    stream
}

fn is_tick(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

/// Whether the pattern ends in `news`; `tail` remembers what may be its beginning.
fn contains(tail: &mut Vec<u8>, news: &[u8], pattern: &[u8]) -> bool {
    tail.extend_from_slice(news);
    let found = tail.windows(pattern.len()).any(|window| window == pattern);
    tail.drain(..tail.len().saturating_sub(pattern.len() - 1));
    found
}
