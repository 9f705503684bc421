"""The operators that a graph may use, as plain names: what exporters refuse early and stage servers resolve.

Only operators that are pure but for the arguments that their schemas say they write to: none opens files or
reaches outside its tensors (`set_`, `resize_`, `as_strided`, `from_file`, … are out). What the names stand for is
left to the stage server, which runs them, and to the exporter, which meets them.
"""

from __future__ import annotations

# Each operator with its overloads; "default" where none is given. A trailing "_" marks an in-place variant.
_ATEN = """
    # elementwise, two operands
    add Tensor Scalar, add_ Tensor Scalar, sub Tensor Scalar, sub_ Tensor Scalar, mul Tensor Scalar,
    mul_ Tensor Scalar, div Tensor Scalar Tensor_mode Scalar_mode out, div_ Tensor Scalar Tensor_mode Scalar_mode,
    true_divide Tensor Scalar, true_divide_ Tensor Scalar, floor_divide default Scalar, floor_divide_ Tensor Scalar,
    rsub Tensor Scalar, subtract Tensor Scalar, multiply Tensor Scalar, divide Tensor Scalar,
    remainder Tensor Scalar Scalar_Tensor, remainder_ Tensor Scalar, fmod Tensor Scalar, fmod_ Tensor Scalar,
    pow Tensor_Tensor Tensor_Scalar Scalar, pow_ Scalar Tensor, float_power Tensor_Tensor Tensor_Scalar Scalar,
    maximum, minimum, fmax, fmin, atan2, hypot, logaddexp, logaddexp2, xlogy Tensor Scalar_Self Scalar_Other,
    copysign Tensor Scalar, heaviside, nextafter, lerp Scalar Tensor, lerp_ Scalar Tensor, addcmul, addcmul_,
    addcdiv, addcdiv_,
    # comparison and logic
    eq Tensor Scalar, ne Tensor Scalar, ge Tensor Scalar, gt Tensor Scalar, le Tensor Scalar, lt Tensor Scalar,
    greater Tensor Scalar, less Tensor Scalar, greater_equal Tensor Scalar, less_equal Tensor Scalar,
    not_equal Tensor Scalar, eq_ Tensor Scalar, ne_ Tensor Scalar, ge_ Tensor Scalar, gt_ Tensor Scalar,
    le_ Tensor Scalar, lt_ Tensor Scalar, isnan, isinf, isfinite, isclose, equal, isin Tensor_Tensor, logical_and,
    logical_and_, logical_or, logical_or_, logical_xor, logical_xor_, logical_not, logical_not_,
    bitwise_and Tensor Scalar, bitwise_and_ Tensor Scalar, bitwise_or Tensor Scalar, bitwise_or_ Tensor Scalar,
    bitwise_xor Tensor Scalar, bitwise_xor_ Tensor Scalar, bitwise_not, bitwise_not_,
    bitwise_left_shift Tensor Tensor_Scalar, bitwise_right_shift Tensor Tensor_Scalar, __and__ Tensor Scalar,
    __iand__ Tensor Scalar, __or__ Tensor Scalar, __ior__ Tensor Scalar, __xor__ Tensor Scalar,
    __ixor__ Tensor Scalar, __lshift__ Tensor Scalar, __rshift__ Tensor Scalar,
    # elementwise, one operand
    abs, abs_, absolute, neg, neg_, negative, positive, sign, sgn, sign_, signbit, exp, exp_, exp2, expm1, expm1_,
    log, log_, log2, log10, log1p, log1p_, logit, logit_, special_expit, sqrt, sqrt_, rsqrt, rsqrt_, square,
    square_, reciprocal, reciprocal_, sin, sin_, sinc, cos, cos_, tan, asin, acos, atan, sinh, cosh, tanh, tanh_,
    asinh, acosh, atanh, arctan2, arctan, erf, erf_, erfc, erfinv, lgamma, digamma, floor, floor_, ceil, ceil_,
    round default decimals, round_ default decimals, trunc, trunc_, frac, clamp default Tensor,
    clamp_ default Tensor, clamp_min default Tensor, clamp_min_ default Tensor, clamp_max default Tensor,
    clamp_max_ default Tensor, clip default Tensor, clip_ default Tensor, nan_to_num, nan_to_num_, deg2rad, rad2deg,
    # complex numbers
    real, imag, complex, polar, angle, conj, conj_physical, _conj, resolve_conj, resolve_neg, view_as_real,
    view_as_complex,
    # activations
    relu, relu_, relu6, relu6_, leaky_relu, leaky_relu_, elu, elu_, selu, selu_, celu, celu_, gelu, gelu_, silu,
    silu_, mish, mish_, sigmoid, sigmoid_, log_sigmoid, hardtanh, hardtanh_, hardsigmoid, hardsigmoid_, hardswish,
    hardswish_, hardshrink, softshrink, softplus, threshold, threshold_, glu, prelu, _prelu_kernel, rrelu, rrelu_,
    softmax int, _softmax, special_softmax, log_softmax int, _log_softmax,
    # linear algebra
    linear, bilinear, matmul, mm, bmm, mv, dot, vdot, inner, outer, ger, kron, addmm, addmm_, addmv, addmv_, addbmm,
    baddbmm, baddbmm_, addr, einsum, tensordot, chain_matmul, linalg_multi_dot, linalg_cross, cross, linalg_norm,
    linalg_vector_norm, linalg_matrix_norm, linalg_matmul, linalg_vecdot, linalg_solve, linalg_inv, linalg_det,
    linalg_slogdet, linalg_cholesky, linalg_diagonal, linalg_solve_triangular, linalg_matrix_exp,
    linalg_householder_product, linalg_qr, inverse, matrix_exp, trace, diag_embed, diag, tril, tril_, triu, triu_,
    cdist, pairwise_distance, pdist, cosine_similarity, _weight_norm, _weight_norm_interface,
    # convolution and attention
    conv1d default padding, conv2d default padding, conv3d default padding, conv_transpose1d,
    conv_transpose2d input, conv_transpose3d input, convolution, _convolution, conv_tbc,
    scaled_dot_product_attention,
    # recurrent networks; packed sequences (".data") are out
    lstm input, gru input, rnn_tanh input, rnn_relu input, lstm_cell, gru_cell, rnn_tanh_cell, rnn_relu_cell,
    # normalisation
    batch_norm, instance_norm, layer_norm, group_norm, rms_norm, native_layer_norm, native_group_norm,
    norm Scalar ScalarOpt_dim ScalarOpt_dim_dtype ScalarOpt_dtype, norm_except_dim, renorm,
    # pooling, resampling, rearranging of images
    max_pool1d, max_pool2d, max_pool3d, max_pool1d_with_indices, max_pool2d_with_indices, max_pool3d_with_indices,
    avg_pool1d, avg_pool2d, avg_pool3d, adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d,
    _adaptive_avg_pool2d, _adaptive_avg_pool3d, adaptive_max_pool1d, adaptive_max_pool2d, adaptive_max_pool3d,
    fractional_max_pool2d, fractional_max_pool3d, max_unpool2d, max_unpool3d, upsample_nearest1d default vec,
    upsample_nearest2d default vec, upsample_nearest3d default vec, _upsample_nearest_exact1d default vec,
    _upsample_nearest_exact2d default vec, _upsample_nearest_exact3d default vec, upsample_linear1d default vec,
    upsample_bilinear2d default vec, upsample_trilinear3d default vec, upsample_bicubic2d default vec,
    _upsample_bilinear2d_aa default vec, _upsample_bicubic2d_aa default vec, grid_sampler, grid_sampler_2d,
    grid_sampler_3d, affine_grid_generator, pixel_shuffle, pixel_unshuffle, channel_shuffle, im2col, col2im, pad,
    constant_pad_nd, reflection_pad1d, reflection_pad2d, reflection_pad3d, replication_pad1d, replication_pad2d,
    replication_pad3d,
    # embeddings
    embedding, embedding_bag default padding_idx, one_hot,
    # losses
    cross_entropy_loss, nll_loss, nll_loss_nd, nll_loss2d, mse_loss, l1_loss, smooth_l1_loss, huber_loss, kl_div,
    binary_cross_entropy, binary_cross_entropy_with_logits, soft_margin_loss, multi_margin_loss,
    multilabel_margin_loss, hinge_embedding_loss, margin_ranking_loss, cosine_embedding_loss, triplet_margin_loss,
    poisson_nll_loss,
    # reductions and scans
    sum default dim_IntList, nansum, mean default dim, nanmean, prod default dim_int, amax, amin, aminmax,
    max default dim other, min default dim other, argmax, argmin, any default dim dims, all default dim dims,
    var default dim correction, std default dim correction, var_mean default dim correction,
    std_mean default dim correction, logsumexp, count_nonzero default dim_IntList, median default dim,
    nanmedian default dim, mode, kthvalue, quantile default scalar, cumsum, cumsum_, cumprod, cummax, cummin,
    logcumsumexp, diff, trapezoid x dx, topk, sort default stable, argsort default stable, msort, bincount, histc,
    searchsorted Tensor Scalar, bucketize Tensor Scalar,
    # indexing and masks; boolean masks give sizes that depend on data, and stay within one value
    index Tensor, index_put, index_put_, _index_put_impl_, index_select, select int, select_scatter, slice_scatter,
    diagonal_scatter, index_add, index_add_, index_copy, index_copy_, index_fill int_Scalar int_Tensor,
    index_fill_ int_Scalar int_Tensor, gather, take, take_along_dim, scatter src value reduce value_reduce,
    scatter_ src value reduce value_reduce, scatter_add, scatter_add_, scatter_reduce two, scatter_reduce_ two,
    masked_fill Scalar Tensor, masked_fill_ Scalar Tensor, masked_select, masked_scatter, masked_scatter_,
    where self ScalarSelf ScalarOther Scalar default, nonzero, nonzero_numpy, argwhere,
    # shape and layout
    view default dtype, _unsafe_view, view_as, reshape, reshape_as, flatten using_ints, unflatten int, ravel,
    squeeze default dim dims, squeeze_ default dim dims, unsqueeze, unsqueeze_, transpose int, transpose_, t, t_,
    adjoint, permute, movedim int intlist, moveaxis int intlist, swapaxes, swapdims, numpy_T, matrix_H, mT, mH,
    expand, expand_as, broadcast_to, broadcast_tensors, atleast_1d, atleast_2d, atleast_3d, narrow default Tensor,
    slice Tensor, chunk, unsafe_chunk, split Tensor sizes, split_with_sizes, unsafe_split Tensor,
    unsafe_split_with_sizes, tensor_split sections indices, hsplit int array, vsplit int array, dsplit int array,
    unbind int, unfold, diagonal, cat, concat, concatenate, stack, hstack, vstack, dstack, column_stack, row_stack,
    block_diag, cartesian_prod, meshgrid default indexing, combinations, repeat, tile,
    repeat_interleave self_int self_Tensor Tensor, flip, fliplr, flipud, roll, rot90, alias, detach, detach_,
    contiguous, clone, copy, copy_, lift_fresh, lift_fresh_copy,
    # type and device; a stage server puts its own device in the place of any other
    to dtype dtype_layout device other, type_as, _to_copy,
    # creation; memory without defined contents is rebuilt as zeros
    arange default start start_step, linspace, logspace, eye default m, zeros, zeros_like, new_zeros, ones,
    ones_like, new_ones, full, full_like, new_full, empty memory_format, empty_like, new_empty, scalar_tensor,
    zero_, zero, fill Scalar Tensor, fill_ Scalar Tensor, tril_indices, triu_indices, hann_window, hamming_window,
    # random numbers; seeded before every call
    dropout, dropout_, feature_dropout, feature_dropout_, alpha_dropout, alpha_dropout_, feature_alpha_dropout,
    feature_alpha_dropout_, native_dropout, rand, rand_like, randn, randn_like, randint default low,
    randint_like default low_dtype, randperm, bernoulli default p, bernoulli_ float Tensor,
    normal Tensor_Tensor Tensor_float float_Tensor float_float, normal_, uniform_, exponential_, multinomial,
    poisson, rrelu_with_noise,
    # spectra
    fft_fft, fft_ifft, fft_rfft, fft_irfft, fft_fft2, fft_ifft2, fft_rfft2, fft_irfft2, fft_fftn, fft_ifftn,
    fft_rfftn, fft_irfftn, fft_fftshift, fft_ifftshift,
    # numbers taken from tensors
    item, _local_scalar_dense, sym_size int, sym_numel,
"""

# Arithmetic on sizes, and getitem on the outputs of an operator with several.
PYTHON_FUNCTIONS: frozenset[str] = frozenset(
    f"python.{name}"
    for name in (
        *("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "round"),
        *("eq", "ne", "ge", "gt", "le", "lt", "and_", "or_", "not_"),
        *("sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_sum", "sym_sqrt"),
        *("trunc", "ceil", "floor"),
    )
)


def _aten_targets(table: str) -> frozenset[str]:
    """Read the table: operators separated by commas, each with its overloads behind its name."""
    lines = (line for line in table.splitlines() if not line.strip().startswith("#"))
    entries = (entry.split() for entry in " ".join(lines).split(",") if entry.strip())
    return frozenset(f"aten.{name}.{overload}" for name, *given in entries for overload in given or ["default"])


ALLOWED_OPERATORS: frozenset[str] = _aten_targets(_ATEN) | PYTHON_FUNCTIONS

# Positions of arguments that an operator writes to although its schema does not say so,
# while its argument 5 (training, use_input_stats) is true.
HIDDEN_MUTATIONS: dict[str, tuple[int, ...]] = {
    "aten.batch_norm.default": (3, 4),  # running mean and variance
    "aten.instance_norm.default": (3, 4),
}

# Operators whose result may be one of their arguments, or a view of one, although their schemas do not say so.
UNANNOTATED_ALIASES: frozenset[str] = frozenset(
    f"aten.{name}"
    for name in (
        # dropout in evaluation, or with p = 0, returns its input
        *("dropout.default", "feature_dropout.default", "alpha_dropout.default", "feature_alpha_dropout.default"),
        *("type_as.default", "conj_physical.default", "round.decimals", "pad.default", "repeat_interleave.self_int"),
        *("atleast_1d.default", "atleast_2d.default", "atleast_3d.default", "broadcast_tensors.default"),
        *("meshgrid.default", "meshgrid.indexing", "cartesian_prod.default", "diag.default", "rot90.default"),
        *("einsum.default", "tensordot.default", "chain_matmul.default", "linalg_multi_dot.default"),
        *("pixel_shuffle.default", "pixel_unshuffle.default", "channel_shuffle.default", "tile.default"),
        *("fft_fftshift.default", "fft_ifftshift.default", "roll.default", "block_diag.default"),
        *("adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default", "adaptive_avg_pool3d.default"),
    )
)


# Namespaces of torch's own operators: what is not in the allow-list is out, and no custom operator.
TORCH_NAMESPACES: frozenset[str] = frozenset(
    (
        *("aten", "prim", "prims", "python", "higher_order", "c10d", "_c10d_functional", "_c10d_functional_autograd"),
        *("c10d_functional", "symm_mem", "_dtensor", "device_mesh", "fsdp", "bucketing", "streams", "semi_structured"),
        *("quantized", "_quantized", "quantized_decomposed", "quantization", "ao", "inductor", "inductor_prims"),
        *("_inductor_test", "_inductor_debug", "_native", "_test", "_torch_testing", "torch_attn", "flex_lib"),
        *("debug_mode_ops", "debugprims", "rngprims", "export", "profiler", "static_runtime", "onnx", "cuda"),
        *("onnx_symbolic", "pippy", "gradwire"),
        *("sparse", "mkl", "mkldnn", "mkldnn_prepacked", "onednn", "prepacked", "xnnpack", "metal", "tensorexpr"),
    )
)
MAXIMUM_CUSTOM_OPERATORS = 1000
MAXIMUM_TARGET_BYTES = 200
MAXIMUM_SCHEMA_BYTES = 4000


def is_allowed(target: str) -> bool:
    """Whether a graph may use `target`, such as "aten.linear.default" or "python.add"."""
    return target in ALLOWED_OPERATORS


def is_custom(target: str) -> bool:
    """Whether `target` is a custom operator, such as "mylibrary.scale.default": for its servers to admit."""
    namespace, _, rest = target.partition(".")
    return bool(rest) and namespace not in TORCH_NAMESPACES
