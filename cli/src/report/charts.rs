//! The charts of a run's page, each drawn twice: wide, and for a phone.

use super::facts::{Facts, end, seconds};
use super::words::{power, time};
use crate::bench::report::charts::{Drawn, Margins, Size, canvas, lanes, letters};
use crate::bench::report::ink::{self, Ink};
use ashore::internal::run_log::SaveLine;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

/// The maximum number of marks of a chart. Beyond that, each column of pixels shows only its least and its
/// greatest mark.
const MARKS: usize = 1800;

/// Begin, end and ink of a bar.
type Bar = ((f64, f64), Ink);

/// Draws one save beside training: waiting, copying, writing and committing over time.
pub fn one_save(save: &SaveLine, interval: f64, size: Size) -> Drawn<String> {
    const LANE: f64 = 64.0;
    let whole = seconds(save.ended).max(1e-6);
    let from_to = |from: u64, to: u64| (seconds(from), seconds(to.max(from)).min(whole));
    let fence = (save.fence > 0).then(|| from_to(save.fence_at, save.fence_at + save.fence));
    let call = from_to(0, save.call);
    let staged = if save.staged == 0 { save.ended } else { save.staged };
    let rows: [(&str, Vec<Bar>); 4] = [
        (
            "training",
            [((0.0, whole), ink::GRID), (call, ink::CALL)]
                .into_iter()
                .chain(fence.map(|fence| (fence, ink::CALL)))
                .collect(),
        ),
        ("copy", vec![(from_to(save.stage_at, staged), ink::STAGING)]),
        ("write", vec![(from_to(save.write_at, save.written), ink::WRITING)]),
        ("commit", vec![(from_to(save.written, save.ended), ink::COMMIT)]),
    ];
    let next = (interval > 0.0 && interval < whole).then_some(interval);
    let height = LANE * rows.len() as f64;
    let sliver = whole * 5.0 / f64::from(size.width - size.left);
    canvas(size, height as u32 + 70, |area| {
        let mut chart = lanes(area, size, Margins { top: 8, right: size.right }, whole, height)?;
        for (i, (name, bars)) in rows.iter().enumerate() {
            let top = LANE * i as f64 + 12.0;
            chart.draw_series(bars.iter().map(|((from, to), ink)| {
                let to = to.max(from + sliver).min(whole);
                Rectangle::new([(from.min(to - sliver), top), (to, top + LANE - 24.0)], ink.rgb().filled())
            }))?;
            let at = (0.0, top + (LANE - 24.0) / 2.0);
            let label = letters(ink::TEXT, HPos::Right, VPos::Center);
            chart.draw_series([EmptyElement::at(at) + Text::new((*name).to_owned(), (-16, 0), label)])?;
        }
        if let Some(next) = next {
            let line = PathElement::new([(next, 0.0), (next, height)], ink::CALL.rgb().stroke_width(2));
            chart.draw_series([line])?;
        }
        Ok(())
    })
}

/// Draws how long training waited for each save, on a log scale; outliers are red.
pub fn stalls(facts: &Facts, size: Size) -> Drawn<String> {
    const LEAST: f64 = 1e-6;
    let all: Vec<(f64, f64)> = facts
        .begun()
        .map(|save| (seconds(end(save).saturating_sub(facts.from)), seconds(save.stall()).max(LEAST)))
        .collect();
    let last = all.iter().map(|(at, _)| *at).fold(0.0, f64::max).max(1.0);
    let low = all.iter().map(|(_, stall)| *stall).fold(1.0, f64::min);
    let high = all.iter().map(|(_, stall)| *stall).fold(LEAST, f64::max);
    let (low, high) = (10_f64.powf(low.log10().floor()), 10_f64.powf(high.log10().floor() + 1.0));
    let marks = thinned(&all, last, MARKS.min(size.width as usize - size.left as usize));
    let outlier = facts.outlier();
    canvas(size, 420, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin_top(24)
            .margin_right(size.right)
            .x_label_area_size(60)
            .y_label_area_size(size.left)
            .build_cartesian_2d(0.0..last, (low..high).log_scale())?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(size.labels)
            .y_labels(8)
            .x_label_formatter(&|at| if *at > 0.0 { time(*at) } else { "0".into() })
            .y_label_formatter(&|stall| power(*stall))
            .axis_style(ink::LIMIT.rgb())
            .bold_line_style(ink::GRID.rgb())
            .light_line_style(TRANSPARENT)
            .label_style(letters(ink::MUTED, HPos::Center, VPos::Top))
            .y_label_style(letters(ink::MUTED, HPos::Right, VPos::Center))
            .draw()?;
        chart.draw_series(marks.iter().map(|(at, stall)| {
            let red = *stall >= outlier;
            let ink = if red { ink::CALL } else { ink::WRITING };
            Circle::new((*at, *stall), if red { 7 } else { 5 }, ink.rgb().filled())
        }))?;
        Ok(())
    })
}

/// Keeps only the least and the greatest mark of each column if there are more than `most` marks.
fn thinned(all: &[(f64, f64)], last: f64, most: usize) -> Vec<(f64, f64)> {
    if all.len() <= most {
        return all.to_vec();
    }
    let columns = most / 2;
    let mut kept: Vec<Option<[(f64, f64); 2]>> = vec![None; columns];
    for &mark in all {
        let column = ((mark.0 / last * columns as f64) as usize).min(columns - 1);
        let [low, high] = kept[column].get_or_insert([mark, mark]);
        *low = if mark.1 < low.1 { mark } else { *low };
        *high = if mark.1 > high.1 { mark } else { *high };
    }
    kept.into_iter().flatten().flat_map(|[low, high]| if low == high { vec![low] } else { vec![low, high] }).collect()
}
