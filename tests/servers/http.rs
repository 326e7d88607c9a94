//! Messages of HTTP/1.1, as far as object stores use them.

use std::io::{self, Read, Write};

/// A request or an answer, whole.
#[derive(Clone, Debug)]
pub struct Message {
    /// The request line, or the status line.
    pub first: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Message {
    pub fn method(&self) -> &str {
        self.first.split(' ').next().unwrap_or("")
    }

    /// The path with the query.
    pub fn path(&self) -> &str {
        self.first.split(' ').nth(1).unwrap_or("")
    }

    pub fn status(&self) -> u16 {
        self.path().parse().unwrap_or(0)
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub fn set(&mut self, name: &str, value: &str) {
        self.headers.retain(|(key, _)| !key.eq_ignore_ascii_case(name));
        self.headers.push((name.to_owned(), value.to_owned()));
    }

    /// The first line and the headers.
    pub fn head(&self) -> Vec<u8> {
        let mut head = format!("{}\r\n", self.first);
        for (key, value) in &self.headers {
            head += &format!("{key}: {value}\r\n");
        }
        (head + "\r\n").into_bytes()
    }

    pub fn write_to(&self, stream: &mut impl Write) -> io::Result<()> {
        stream.write_all(&self.head())?;
        stream.write_all(&self.body)?;
        stream.flush()
    }
}

/// The answer of S3 to a request that it refuses. Its clock is that of the machine.
pub fn error(status: u16, code: &str) -> Message {
    let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>made by the proxy</Message></Error>");
    let mut answer =
        Message { first: format!("HTTP/1.1 {status} Fault"), headers: Vec::new(), body: body.into_bytes() };
    answer.set("content-type", "application/xml");
    answer.set("x-amz-request-id", "proxy");
    // An hour and more before any clock that these tests run under.
    answer.set("date", "Sat, 28 Nov 2026 01:02:03 GMT");
    if status == 429 || status == 503 {
        answer.set("retry-after", "0");
    }
    answer.set("content-length", &answer.body.len().to_string());
    answer
}

/// Reads a request; None when the client has ended the connection between two of them.
pub fn read_request(stream: &mut (impl Read + Write)) -> io::Result<Option<Message>> {
    let Some(mut request) = read_head(stream)? else { return Ok(None) };
    if request.get("expect").is_some() {
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
    }
    read_body(stream, &mut request, Some(0))?;
    Ok(Some(request))
}

/// Reads an answer. What a client of another connection gets has its length in its head.
pub fn read_answer(stream: &mut impl Read, bare: bool) -> io::Result<Message> {
    let mut answer = read_head(stream)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    answer
        .headers
        .retain(|(key, _)| !key.eq_ignore_ascii_case("connection") && !key.eq_ignore_ascii_case("keep-alive"));
    answer.first = answer.first.replacen("HTTP/1.0", "HTTP/1.1", 1);
    if !bare && ![204, 304].contains(&answer.status()) {
        read_body(stream, &mut answer, None)?;
        answer.headers.retain(|(key, _)| !key.eq_ignore_ascii_case("transfer-encoding"));
        answer.set("content-length", &answer.body.len().to_string());
    }
    Ok(answer)
}

fn read_head(stream: &mut impl Read) -> io::Result<Option<Message>> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte)? == 0 {
            return Ok(None);
        }
        head.push(byte[0]);
        if head.len() > 64 << 10 {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    let head = String::from_utf8_lossy(&head);
    let mut lines = head.split("\r\n").filter(|line| !line.is_empty());
    let first = lines.next().ok_or(io::ErrorKind::InvalidData)?.to_owned();
    let pair = |line: &str| line.split_once(':').map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned()));
    Ok(Some(Message { first, headers: lines.filter_map(pair).collect(), body: Vec::new() }))
}

/// Reads a body; without a length in the head it has `otherwise` bytes, or ends with the connection.
fn read_body(stream: &mut impl Read, message: &mut Message, otherwise: Option<u64>) -> io::Result<()> {
    if message.get("transfer-encoding").is_some_and(|encoding| encoding.eq_ignore_ascii_case("chunked")) {
        return read_chunks(stream, &mut message.body);
    }
    match message.get("content-length").map_or(otherwise, |length| length.parse().ok()) {
        Some(length) => {
            stream.take(length).read_to_end(&mut message.body)?;
            if message.body.len() as u64 == length { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
        }
        None => stream.read_to_end(&mut message.body).map(drop),
    }
}

fn read_chunks(stream: &mut impl Read, body: &mut Vec<u8>) -> io::Result<()> {
    loop {
        let (mut line, mut byte) = (Vec::new(), [0]);
        while !line.ends_with(b"\r\n") {
            stream.read_exact(&mut byte)?;
            line.push(byte[0]);
        }
        let line = String::from_utf8_lossy(&line);
        let length = u64::from_str_radix(line.trim().split(';').next().unwrap_or(""), 16);
        let length = length.map_err(|_| io::ErrorKind::InvalidData)?;
        stream.take(length).read_to_end(body)?;
        stream.read_exact(&mut [0; 2])?;
        if length == 0 {
            return Ok(());
        }
    }
}

/// Standard base64, with padding.
pub fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let bits = three.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
        for i in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * i) & 63) as usize];
            text.push(if i <= three.len() { digit.into() } else { '=' });
        }
    }
    text
}
